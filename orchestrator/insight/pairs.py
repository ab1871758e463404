"""Analyse the pair ledger: which pairs were learned or look mislabelled, and the effect of length.

Shapes: V visits (rows of the ledger), N pairs, K bins. A margin is beta times nats; all numbers of
a visit are from before its own update.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.order import Integers
from orchestrator.data.sources import RawRow, in_one_line

if TYPE_CHECKING:
    import pyarrow as pa

Numbers = NDArray[np.float64]
SIDES = ("prompt", "chosen", "rejected")


class Histories(NamedTuple):
    """Results per pair, in the order of ids; all [N], of the last visit unless noted."""

    pair_id: Integers
    visits: Integers
    first_margin: Numbers
    margin: Numbers
    trend: Numbers  # change of the margin per visit, by least squares; NaN for a single visit
    preferred: Numbers  # nats per token by which the policy prefers the chosen completion
    ref_preferred: Numbers  # the same of the reference
    longer: Integers  # tokens by which the chosen completion is longer


def histories(rows: "pa.Table") -> Histories:
    """Return the results per pair from the V rows of a ledger, in any order."""
    of = {name: rows[name].to_numpy() for name in rows.column_names}
    order = np.lexsort((of["step"], of["pair_id"]))
    of = {name: column[order] for name, column in of.items()}
    pair_id, first, visits = np.unique(of["pair_id"], return_index=True, return_counts=True)
    last = first + visits - 1
    margin = of["margin"]
    tokens = {side: np.maximum(of[f"{side}_tokens"][last], 1) for side in ("chosen", "rejected")}

    visit = np.arange(len(margin)) - np.repeat(first, visits)
    centred = visit - np.repeat((visits - 1) / 2, visits)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a single visit
        trend = np.add.reduceat(centred * margin, first) / np.add.reduceat(centred**2, first)

    def preferred(which: str) -> Numbers:
        per_token = {side: of[f"{which}{side}_logps"][last] / tokens[side] for side in tokens}
        return per_token["chosen"] - per_token["rejected"]

    return Histories(
        pair_id=pair_id,
        visits=visits,
        first_margin=margin[first],
        margin=margin[last],
        trend=trend,
        preferred=preferred(""),
        ref_preferred=preferred("ref_"),
        longer=of["chosen_tokens"][last].astype(np.int64) - of["rejected_tokens"][last],
    )


def never_learned(pairs: Histories) -> Integers:
    """Return the indices of pairs with a last margin of at most 0, the lowest first."""
    indices = np.flatnonzero(pairs.margin <= 0)
    return indices[np.argsort(pairs.margin[indices], kind="stable")]


def disagreement(pairs: Histories) -> Numbers:
    """Return [N] nats per token by which both models prefer the rejected completion.

    The models are reference and policy, and the number is the smaller of both; it is below 0 if one
    of them does not prefer that completion. Per token, because sums over more tokens are lower:
    by sums, every longer completion would look dispreferred. The smaller, because a label is
    doubtful only if both models contradict it.
    """
    return np.minimum(-pairs.preferred, -pairs.ref_preferred)


def mislabelled(pairs: Histories) -> Integers:
    """Return the indices of pairs whose rejected completion both models prefer.

    The strongest `disagreement` comes first.
    """
    by = disagreement(pairs)
    indices = np.flatnonzero(by > 0)
    return indices[np.argsort(-by[indices], kind="stable")]


def accuracies(rows: "pa.Table") -> dict[int, float]:
    """Return the share of visits with a margin above 0, by epoch."""
    epochs, right = rows["epoch"].to_numpy(), rows["margin"].to_numpy() > 0
    return {int(epoch): float(right[epochs == epoch].mean()) for epoch in np.unique(epochs)}


def rank_correlation(left: NDArray[Any], right: NDArray[Any]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties.

    It is None if all values of a side are equal.
    """
    ranks = [_ranks(side) for side in (left, right)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale else None


def _ranks(values: NDArray[Any]) -> Numbers:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


class LengthBin(NamedTuple):
    """Pairs with a similar difference in length, chosen minus rejected."""

    least: int  # tokens, chosen minus rejected
    most: int
    pairs: int
    margin: float  # mean
    learned: float  # share of the pairs


def by_length(pairs: Histories) -> list[LengthBin]:
    """Return [K] bins by difference in length.

    There are two halves each of shorter and of longer chosen completions, and the equal ones.
    """
    sides = (pairs.longer[pairs.longer < 0], pairs.longer[pairs.longer > 0])
    halves = [np.median(side) for side in sides if len(side)]
    place = np.searchsorted(np.sort([-1, 0, *halves]), pairs.longer)
    bins: list[LengthBin] = []
    for number in np.unique(place):
        longer, margin = pairs.longer[place == number], pairs.margin[place == number]
        least, most, learned = int(longer.min()), int(longer.max()), float((margin > 0).mean())
        bins.append(LengthBin(least, most, len(longer), float(margin.mean()), learned))
    return bins


# --- a run, for a terminal or as JSON -------------------------------------------------------------


class Findings(NamedTuple):
    """Results of analysing a ledger."""

    step: int  # of the newest checkpoint
    visits: int
    accuracies: dict[int, float]  # by epoch
    pairs: Histories
    never_learned: Integers  # indices of pairs
    mislabelled: Integers  # indices of pairs
    length_correlation: float | None

    def first_ids(self, top: int) -> list[int]:
        """Return the ids of the first pairs of both lists."""
        return self.pairs.pair_id[[*self.never_learned[:top], *self.mislabelled[:top]]].tolist()


def analyse(step: int, rows: "pa.Table") -> Findings:
    """Analyse the V rows of a ledger up to a step; V is at least 1."""
    pairs = histories(rows)
    return Findings(
        step=step,
        visits=rows.num_rows,
        accuracies=accuracies(rows),
        pairs=pairs,
        never_learned=never_learned(pairs),
        mislabelled=mislabelled(pairs),
        length_correlation=rank_correlation(pairs.longer, pairs.margin),
    )


def as_json(findings: Findings, top: int, texts: Mapping[int, RawRow]) -> dict[str, Any]:
    """Return all findings as JSON types, with full texts."""

    def shown(indices: Integers) -> list[dict[str, Any]]:
        return [_pair_as_json(findings.pairs, index, texts) for index in indices[:top]]

    pairs, never, mislabelled = findings.pairs, findings.never_learned, findings.mislabelled
    return {
        "step": findings.step,
        "visits": findings.visits,
        "pairs": len(pairs.pair_id),
        "learned": float((pairs.margin > 0).mean()),
        "accuracies": findings.accuracies,
        "never_learned": {"pairs": len(never), "lowest": shown(never)},
        "mislabelled": {"pairs": len(mislabelled), "strongest": shown(mislabelled)},
        "length": {
            "rank_correlation": findings.length_correlation,
            "bins": [b._asdict() for b in by_length(pairs)],
        },
    }


def _pair_as_json(pairs: Histories, index: int, texts: Mapping[int, RawRow]) -> dict[str, Any]:
    of = {name: column[index].item() for name, column in pairs._asdict().items()}
    raw = texts.get(of["pair_id"])
    if of["visits"] == 1:
        of["trend"] = None
    if raw is None:
        return of
    return {
        **of,
        "source": raw.source,
        "row": raw.number,
        **{side: raw.row[side] for side in SIDES},
    }


def as_lines(findings: Findings, top: int, texts: Mapping[int, RawRow]) -> Iterator[str]:
    """Yield the findings; of both lists the first `top` pairs with numbers and shortened texts."""
    pairs, count = findings.pairs, len(findings.pairs.pair_id)
    learned = int((pairs.margin > 0).sum())
    yield f"{findings.visits} visits of {count} pairs up to step {findings.step}"
    yield f"learned {learned} ({learned / count:.1%}): margin above 0 at the last visit"
    by_epoch = ", ".join(f"{share:.3f}" for share in findings.accuracies.values())
    yield f"rewards/accuracies by epoch: {by_epoch}"
    if findings.visits == count:
        once = "each pair was seen once, before its own update"
        yield f"{once}: its margin comes from updates on other pairs"
    yield from _length_lines(findings)
    if len(sources := {raw.source for raw in texts.values()}) == 1:
        yield f"\nrows are from {sources.pop()}"
    if len(findings.never_learned):
        yield f"\nnever learned: {len(findings.never_learned)} pairs, the lowest margin first"
    for index in findings.never_learned[:top]:
        yield f"{_name(pairs, index, texts)}: {_margins(pairs, index)}"
        yield from _pair_texts(pairs, index, texts)
    if number := len(findings.mislabelled):
        both = "whose rejected completion both models prefer"
        yield f"\nlook mislabelled: {number} pairs {both}, in nats per token"
    for index in findings.mislabelled[:top]:
        reference, policy = -pairs.ref_preferred[index], -pairs.preferred[index]
        by = f"reference by {reference:.3f}, policy by {policy:.3f}"
        yield f"{_name(pairs, index, texts)}: {by}; {_margins(pairs, index)}"
        yield from _pair_texts(pairs, index, texts)


def _length_lines(findings: Findings) -> Iterator[str]:
    if findings.length_correlation is None:
        return
    correlation = "rank correlation of chosen minus rejected tokens with the margin"
    yield f"\nlength: {correlation} {findings.length_correlation:+.3f}"
    yield "       tokens       pairs  mean margin  learned"
    for least, most, count, margin, learned in by_length(findings.pairs):
        yield f"{least:>8} to {most:<6} {count:>6}  {margin:>+11.4f}  {learned:>7.1%}"


def _name(pairs: Histories, index: int, texts: Mapping[int, RawRow]) -> str:
    if (raw := texts.get(int(pairs.pair_id[index]))) is None:
        return f"pair {pairs.pair_id[index]}"
    several = len({raw.source for raw in texts.values()}) > 1
    return f"row {raw.number} of {raw.source}" if several else f"row {raw.number}"


def _margins(pairs: Histories, index: int) -> str:
    margin, visits = f"margin {pairs.margin[index]:+.3f}", int(pairs.visits[index])
    if visits == 1:
        return f"{margin} at its only visit"
    first, trend = pairs.first_margin[index], pairs.trend[index]
    return f"{margin} after {visits} visits, {first:+.3f} at first, {trend:+.3f} per visit"


def _pair_texts(pairs: Histories, index: int, texts: Mapping[int, RawRow]) -> Iterator[str]:
    if (raw := texts.get(int(pairs.pair_id[index]))) is not None:
        for side in SIDES:
            yield f"  {side:<8}  {in_one_line(_message_text(raw.row[side]))}"


def _message_text(part: str | list[dict[str, Any]]) -> str:
    """Return a text, or the contents of messages, with roles if there are several."""
    if isinstance(part, str):
        return part
    texts = [
        str(message.get("content") or json.dumps(message.get("tool_calls"))) for message in part
    ]
    if len(part) == 1:
        return texts[0]
    return " | ".join(
        f"{message['role']}: {text}" for message, text in zip(part, texts, strict=True)
    )
