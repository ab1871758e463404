"""Print the fault table in Markdown from the rows that the tests of faults recorded.

FAULT_TABLE=rows.jsonl python -m pytest tests/faults -m "slow or not slow"
python tests/faults/table.py rows.jsonl
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median


def table(rows: list[dict[str, str | float]]) -> str:
    """Return one line for each fault and outcome, with how often and in how many seconds."""
    seconds = defaultdict[tuple[str, str, str], list[float]](list)
    for row in rows:
        key = (str(row["group"]), str(row["fault"]), str(row["outcome"]))
        seconds[key].append(float(row["seconds"]))
    names = ("kind", "fault", "times", "outcome", "median s", "longest s")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (group, fault, outcome), took in sorted(seconds.items()):
        figures = f"{len(took)} | {outcome} | {median(took):.1f} | {max(took):.1f}"
        lines.append(f"| {group} | {fault} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
