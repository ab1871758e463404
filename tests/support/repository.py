"""The root of the repository, and the commands that its documentation shows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def doc_commands(page: str, heading: str) -> list[str]:
    """Return the blocks of commands below a heading of a page of docs/, as written there."""
    below = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2]
    chapter = re.split(r"\n##+ ", below)[0]
    return re.findall(r"```bash\n(.*?)```", chapter, re.DOTALL)
