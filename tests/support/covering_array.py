"""Rows of settings in which every two that can be together are together somewhere: a covering array
of strength two.
"""

import random
from collections.abc import Callable, Sequence
from itertools import combinations

Row = dict[str, str]
"""The value of each part."""
Pair = frozenset[tuple[str, str]]
CANDIDATES = 12  # rows that are tried for each one that is taken


def pairs_of(row: Row) -> set[Pair]:
    """Every two values that stand in a row."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def covering(
    parts: dict[str, Sequence[str]],
    refused: Callable[[Row], bool],
    begun: Sequence[Row] = (),
    seed: int = 0,
) -> list[Row]:
    """Rows that, beside those begun with, have every pair of values that some row can have;
    greedily few, and the same for the same seed.

    refused: whether a row of some of the parts cannot be, whatever the others are.
    """
    draw = random.Random(seed)
    entries = [(part, value) for part, values in parts.items() for value in values]
    # a dict: it has an order
    missing = {frozenset((a, b)): None for a, b in combinations(entries, 2) if a[0] != b[0]}
    for row in begun:
        for pair in pairs_of(row):
            missing.pop(pair, None)
    rows: list[Row] = []
    while missing:
        pair = next(iter(missing))
        candidates = [
            row
            for _ in range(CANDIDATES)
            if (row := _completed(dict(pair), parts, refused, missing, draw))
        ]
        if not candidates:
            del missing[pair]  # the two cannot be together
            continue
        rows.append(max(candidates, key=lambda row: len(pairs_of(row) & missing.keys())))
        for pair in pairs_of(rows[-1]):
            missing.pop(pair, None)
    return [{part: row[part] for part in parts} for row in rows]


def _completed(
    row: Row,
    parts: dict[str, Sequence[str]],
    refused: Callable[[Row], bool],
    missing: dict[Pair, None],
    draw: random.Random,
) -> Row | None:
    """The row with a value for every part, in an order that is drawn, each the one with most of
    what is missing.
    """
    if refused(row):
        return None
    left = [part for part in parts if part not in row]
    if not left:
        return row
    part = draw.choice(left)

    def gain(value: str) -> tuple[int, float]:
        return sum(
            frozenset(((part, value), other)) in missing for other in row.items()
        ), draw.random()

    for value in sorted(parts[part], key=gain, reverse=True):
        if whole := _completed(row | {part: value}, parts, refused, missing, draw):
            return whole
    return None
