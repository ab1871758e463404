"""Find the known name that is most similar to what a user typed."""

import difflib
from collections.abc import Iterable


def folded(name: str) -> str:
    """Return a name in lower case, with `_` for `-` and spaces."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def nearest(typed: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name that equals `typed` up to case and dashes, else the most similar one, else
    None.

    cutoff: minimum similarity of a match, as in difflib; 1 is equality.
    """
    by_folded: dict[str, str] = {}
    for name in names:
        by_folded.setdefault(folded(name), name)
    near = difflib.get_close_matches(folded(typed), by_folded, n=1, cutoff=cutoff)
    return by_folded[near[0]] if near else None
