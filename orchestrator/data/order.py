"""Order the data: the balanced micro-batches of each rank and step, in integer arithmetic equal on
every rank.

Shapes: N pairs of the data, E pairs per epoch, G pairs per global batch, S global batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.settings.training import TrainingSpec

Integers = NDArray[np.int64]

MANY = (
    1024  # pairs per rank from which `deal_many` is balanced enough (evaluation sets, not batches)
)


def scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele et al.

    2014), a pseudo-random bijection of 64-bit integers.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(pairs: int, seed: int, epoch: int) -> Integers:
    """Return a permutation [N]. It uses no library's generator, whose new release could reorder a
    running job.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        key = scrambled(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        key = scrambled(key ^ np.uint64(epoch))
        hashes = scrambled(np.arange(pairs, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)
    return np.argsort(hashes, kind="stable")


class Share(NamedTuple):
    """Share of a training set in every epoch."""

    pairs: int  # in the set
    per_epoch: int  # used per epoch: fewer than `pairs`, or some more than once

    @classmethod
    def of(cls, pairs: int, weight: float) -> "Share":
        """Return the share of a set whose pairs are seen `weight` times per epoch."""
        return cls(pairs, max(min(pairs, 1), round(weight * pairs)))

    def taken(self, seed: int, epoch: int) -> Integers:
        """Return [per_epoch] ascending indices of the pairs in an epoch; repeated pairs are
        adjacent.

        The set is traversed in passes, each with its own order; an epoch continues where the
        previous one stopped. So, after any number of epochs, the counts of any two pairs differ by
        at most one.
        """
        times = np.zeros(self.pairs, np.int64)
        for end, sign in (((epoch + 1) * self.per_epoch, 1), (epoch * self.per_epoch, -1)):
            passes, begun = divmod(end, self.pairs)
            times += sign * passes
            if begun:
                times[permutation(self.pairs, seed, passes)[:begun]] += sign
        return np.repeat(np.arange(self.pairs), times)


# the current epoch, and the next one, which a prefetching loader already reads
@lru_cache(maxsize=2)
def epoch_order(shares: tuple[Share, ...], seed: int, epoch: int) -> Integers:
    """Return [E] indices of the pairs of an epoch, in training order; indices continue from one set
    to the next.
    """
    taken, first = [], 0
    for number, share in enumerate(shares, 1):
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
            # a seed per set: two sets of the same size would have the same order
            own = scrambled(
                np.array([seed], np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number)
            )
        taken.append(first + share.taken(int(own[0]), epoch))
        first += share.pairs
    pairs = np.concatenate(taken)
    return pairs[permutation(len(pairs), seed, epoch)]


def deal(costs: Integers, ranks: int) -> Integers:
    """Assign the pairs of global batches to ranks, balanced by cost: the most expensive remaining
    pair goes to the rank with the smallest load (LPT, Graham 1969).

    costs: [S, G] integers. Returns [S, G], the rank of each pair.
    Vectorised over S, in blocks whose loads fit in the CPU cache.
    """
    batches, size = costs.shape
    owners = np.empty((batches, size), np.int64)
    block = max(1, 2**17 // ranks)
    for start in range(0, batches, block):
        part = costs[start : start + block]
        by_cost = np.argsort(-part, axis=1, kind="stable")
        loads = np.zeros((len(part), ranks), np.int64)
        rows = np.arange(len(part))
        for k in range(size):
            position = by_cost[:, k]
            lightest = loads.argmin(axis=1)
            loads[rows, lightest] += part[rows, position]
            owners[start + rows, position] = lightest
    return owners


def fed_lengths(lengths: Integers, keep_last: int | None) -> Integers:
    """Return [N, 3] tokens after each sequence is cut to its last `keep_last` tokens (keep_end).

    The two sides lose different parts of the prompt; prompt tokens that only one side keeps count
    as its completion.
    """
    if keep_last is None:
        return lengths
    sequences = np.minimum(lengths[:, :1] + lengths[:, 1:], keep_last)  # [N, 2]
    lost = (lengths[:, :1] + lengths[:, 1:] - sequences).max(axis=1)
    prompt = np.maximum(lengths[:, 0] - lost, 0)
    return np.column_stack([prompt, sequences - prompt[:, None]])


def scored_chosen(lengths: Integers, keep_last: int | None) -> Integers:
    """Return [N] scored tokens of the chosen completions; a token at position 0 is not scored.

    lengths: [N, 3] tokens before keep_end is applied."""
    fed = lengths[:, 0] + lengths[:, 1]
    if keep_last is not None:
        fed = np.minimum(fed, keep_last)
    return np.minimum(lengths[:, 1], np.maximum(fed, 1) - 1)


def longest_sequences(lengths: Integers) -> Integers:
    """Return [N] tokens of the longer sequence of each pair.

    lengths: [N, 3] of prompt, chosen and rejected.
    """
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)


def deal_many(costs: Integers, ranks: int) -> Integers:
    """Assign very many pairs to ranks in zigzag order by cost: nearly as balanced as `deal`,
    without a loop.

    costs: [N]. Returns [N], the rank of each pair.
    """
    lane = np.arange(len(costs)) % (2 * ranks)
    owners = np.empty(len(costs), np.int64)
    owners[np.argsort(-costs, kind="stable")] = np.minimum(lane, 2 * ranks - 1 - lane)
    return owners


class PairCost(NamedTuple):
    """Cost of a pair by its tokens, in any unit (models/policy.py counts multiplications)."""

    token: int = 1  # a token in the body, without attention
    scored: int = 0  # a token in the output head
    seen: int = 0  # a pair (query, key) in attention

    def of(self, lengths: Integers, packed: bool) -> Integers:
        """Return the cost [N] of pairs. lengths: [N, 3] tokens of prompt, chosen and rejected."""
        prompt, completions = lengths[:, 0], lengths[:, 1:]
        tokens = prompt + completions.sum(axis=1)
        seen = ((prompt[:, None] + completions) ** 2).sum(axis=1) // 2
        if packed:  # the prompt is computed once
            return (
                self.token * tokens
                + self.scored * completions.sum(axis=1)
                + self.seen * (seen - prompt**2 // 2)
            )
        return (
            self.token * (tokens + prompt)
            + self.scored * completions.sum(axis=1)
            + self.seen * seen
        )


TOKENS = PairCost()


class RunLength(NamedTuple):
    """Length of a run, in epochs, steps and pairs."""

    epochs: float
    steps: int  # optimizer steps
    pairs: int | None  # the pair after which the run ends; None when training.max_steps decides


def run_length(pairs: int, global_batch_size: int, training: TrainingSpec) -> RunLength:
    """Return the length of a run whose epochs have `pairs` pairs. It ends when max_steps or epochs
    is reached; after 1 epoch if neither is set.
    """
    by_epochs = _length_of_epochs(pairs, global_batch_size, training.epochs or 1.0)
    if training.max_steps is None or (
        training.epochs is not None and by_epochs.steps <= training.max_steps
    ):
        return by_epochs
    whole, rest = divmod(training.max_steps, -(-pairs // global_batch_size))
    return RunLength(whole + min(rest * global_batch_size, pairs) / pairs, training.max_steps, None)


def _length_of_epochs(pairs: int, global_batch_size: int, epochs: float) -> RunLength:
    per_epoch = -(-pairs // global_batch_size)
    whole = int(epochs)
    rest = round((epochs - whole) * pairs)
    if whole + rest == 0:
        rest = 1  # train at least one pair
    return RunLength(
        epochs, whole * per_epoch + -(-rest // global_batch_size), whole * pairs + rest
    )


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward pass on one rank.

    A filler has weight 0 and only keeps the ranks' collectives aligned.
    """

    pairs: Integers
    is_filler: bool = False


@dataclass(frozen=True)
class StepPlan:
    """Data of one optimizer step on one rank."""

    epoch: int
    pairs_seen: int  # before this step
    global_pairs: Integers  # [G], the whole global batch
    micro_batches: list[MicroBatch]  # of this rank; equally many on every rank


@dataclass(frozen=True)
class Order:
    """The order of data for one rank, a pure function of `pairs_seen`."""

    lengths: Integers  # [N, 3] tokens of prompt, chosen, rejected after truncation
    global_batch_size: int  # pairs
    rank: int
    world_size: int
    seed: int
    max_pairs: int | None = None  # per micro-batch; at least one of this and the next is set
    # per micro-batch, including padding; a longer single pair gets its own micro-batch
    max_tokens: int | None = None
    packed: bool = True  # prompt | chosen | rejected in one row; else two padded rows per pair
    cost: PairCost = TOKENS  # balanced over the ranks
    # per training set, in the order of their pairs; empty: one set, used whole
    shares: tuple[Share, ...] = ()
    tokens: Integers = field(init=False, repr=False)  # [N] of both sequences
    costs: Integers = field(init=False, repr=False)  # [N]

    def __post_init__(self) -> None:
        if not self.shares:
            object.__setattr__(self, "shares", (Share(self.pairs, self.pairs),))
        object.__setattr__(
            self, "tokens", 2 * self.lengths[:, 0] + self.lengths[:, 1] + self.lengths[:, 2]
        )
        object.__setattr__(self, "costs", self.cost.of(self.lengths, self.packed))

    @property
    def pairs(self) -> int:
        """Return the number of pairs, N."""
        return len(self.lengths)

    @property
    def pairs_per_epoch(self) -> int:
        """Return the number of pairs per epoch, E."""
        return sum(share.per_epoch for share in self.shares)

    @property
    def takes_each_once(self) -> bool:
        """Return whether every epoch contains each pair exactly once."""
        return all(share.per_epoch == share.pairs for share in self.shares)

    def plan(self, pairs_seen: int) -> StepPlan:
        """Return the step that starts after `pairs_seen` pairs, counted from the start of training
        over all epochs.
        """
        epoch, offset = divmod(pairs_seen, self.pairs_per_epoch)
        batch = epoch_order(self.shares, self.seed, epoch)[offset : offset + self.global_batch_size]
        return StepPlan(epoch, pairs_seen, batch, self.micro_batches(batch))

    def whole(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of an evaluation, which contains every pair once."""
        return self.micro_batches(np.arange(self.pairs))

    def micro_batches(self, batch: Integers) -> list[MicroBatch]:
        """Return this rank's share of some pairs [G]; every rank gets equally many micro-batches,
        including fillers.
        """
        costs = self.costs[batch]
        many = len(batch) > MANY * self.world_size
        owners = (
            deal_many(costs, self.world_size) if many else deal(costs[None], self.world_size)[0]
        )
        # pairs of similar length share a micro-batch: less padding
        dear_to_cheap = np.argsort(-costs, kind="stable")
        per_rank = [
            [
                batch[positions]
                for positions in self._cut(dear_to_cheap[owners[dear_to_cheap] == rank], batch)
            ]
            for rank in range(self.world_size)
        ]
        mine = [MicroBatch(pairs) for pairs in per_rank[self.rank]]
        cheapest = batch[dear_to_cheap[-1:]]
        fillers = max(map(len, per_rank)) - len(mine)
        return mine + [MicroBatch(cheapest, is_filler=True)] * fillers

    def _cut(self, positions: Integers, batch: Integers) -> Iterator[Integers]:
        """Split one rank's pairs, sorted by decreasing cost, into micro-batches."""
        lengths = self.lengths[batch]
        packed, longest = lengths.sum(axis=1), longest_sequences(lengths)
        start, tokens, width = 0, 0, 0
        for end, position in enumerate(positions):
            tokens, width = tokens + int(packed[position]), max(width, int(longest[position]))
            pairs = end + 1 - start
            fed = tokens if self.packed else 2 * pairs * width
            if pairs > 1 and (pairs > (self.max_pairs or pairs) or fed > (self.max_tokens or fed)):
                yield positions[start:end]
                start, tokens, width = end, int(packed[position]), int(longest[position])
        if start < len(positions):
            yield positions[start:]
