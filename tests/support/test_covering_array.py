"""A covering array has every two values that can be together, and no row that cannot be."""

from itertools import product

from support.covering_array import Row, covering, pairs_of

PARTS = {"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2", "3"], "d": ["1", "2"]}


def refused(row: Row) -> bool:
    return (row.get("a"), row.get("b")) == ("1", "1") or (row.get("c"), row.get("d")) == ("2", "2")


def test_every_pair_that_can_be_is_there_in_few_rows() -> None:
    rows = [dict(zip(PARTS, values, strict=True)) for values in product(*PARTS.values())]
    possible = set[frozenset[tuple[str, str]]]().union(
        *(pairs_of(row) for row in rows if not refused(row))
    )
    actual = covering(PARTS, refused)
    assert set().union(*map(pairs_of, actual)) == possible
    assert not any(map(refused, actual))
    assert len(actual) <= 12 < sum(not refused(row) for row in rows)
    assert covering(PARTS, refused) == actual


def test_rows_that_are_there_are_not_made_again() -> None:
    begun = covering(PARTS, refused)
    assert covering(PARTS, refused, begun=begun) == []
    more = covering({**PARTS, "e": ["1", "2"]}, refused, begun=[row | {"e": "1"} for row in begun])
    assert all(row["e"] == "2" for row in more)
