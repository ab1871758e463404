"""Load the micro-batches of one rank step by step, with prefetching and cached reference
log-probs.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from orchestrator.data.collate import (
    CollateContext,
    Counts,
    PackedCollator,
    PairBatch,
    PreferenceCollator,
)
from orchestrator.data.order import Integers, MicroBatch, Order, StepPlan, scored_chosen
from orchestrator.data.pairs import Pairs
from orchestrator.data.refcache import RefCache
from orchestrator.data.user_collator import AdaptedCollator

Collator = PackedCollator | PreferenceCollator | AdaptedCollator

PREFETCHED_STEPS = 2


class StepBatches(NamedTuple):
    """Micro-batches of one optimizer step on this rank, and the counts that divide their sums."""

    epoch: int
    pairs_seen: int  # after this step
    micro_batches: list[PairBatch]
    indices: list[Integers]  # of each micro-batch's pairs in the data set
    counts: Counts  # of the global batch, or only of this rank if `are_local`
    are_local: (
        bool  # True for a user's collator, which may change counts: they must be summed over ranks
    )


class Loader:
    """Iterator over steps from any position in the data.

    Built-in collators run ahead in a thread. A user's collator runs in the main thread, because it
    may draw random numbers, whose order must be the same after a resume.
    """

    def __init__(self, pairs: Pairs, order: Order, collator: Collator) -> None:
        self.pairs, self.order, self.collator = pairs, order, collator
        self.cache: RefCache | None = None  # of the reference's log-probs
        keep_last = None if isinstance(collator, AdaptedCollator) else collator.keep_last
        self._scored_chosen = scored_chosen(pairs.lengths, keep_last)
        self._epoch: int | None = None

    def steps(self, pairs_seen: int, step: int) -> Generator[StepBatches]:
        """Yield every step from a position on, endlessly; the caller closes it.

        step: optimizer steps taken before.
        """
        plain = self._steps(pairs_seen, step)
        with closing(
            plain if isinstance(self.collator, AdaptedCollator) else _prefetched(plain)
        ) as steps:
            for batches in steps:
                yield self._with_known_reference(batches)

    def first(self) -> list[PairBatch]:
        """Return this rank's micro-batches of the first step (equally many on every rank), without
        cached log-probs.
        """
        return self._make(self.order.plan(0), step=1).micro_batches

    def whole(self, step: int) -> tuple[list[MicroBatch], Callable[[MicroBatch], PairBatch]]:
        """Return this rank's micro-batches of an evaluation (every pair once), and a function that
        collates one.
        """
        context = self._context(step, np.arange(self.order.pairs))
        if self.cache is not None:
            self.cache.read()

        def make(micro: MicroBatch) -> PairBatch:
            batch = self._collate(micro, context)
            if self.cache is None:
                return batch
            return batch._replace(ref_logps=self.cache.known(micro.pairs))

        return self.order.whole(), make

    def batch(self, pairs: Integers, step: int) -> PairBatch:
        """Return the pairs at these indices as one evaluation batch, without cached log-probs."""
        return self._collate(MicroBatch(pairs), self._context(step, np.arange(self.order.pairs)))

    def counts_of(self, pairs: Integers) -> Counts:
        """Return the counts of these pairs with built-in collators; a user's collator may score
        other tokens.
        """
        scored = self._scored_chosen[pairs]
        if self.pairs.weights is None:
            return Counts(len(pairs), int(scored.sum()))
        weights = self.pairs.weights[pairs]
        return Counts(float(weights.sum()), float(weights @ scored))

    def remember(self, batch: PairBatch, ref_logps: torch.Tensor) -> None:
        """Cache the reference log-probs of a batch (still on the host) that had none; waits for the
        device.

        Fillers are not cached: their pair is also in another rank's batch, where the last bit may
        differ.
        """
        if self.cache is not None and batch.ref_logps is None and batch.pair_weights.any():
            self.cache.add(batch.pair_ids, ref_logps)

    def _steps(self, pairs_seen: int, step: int) -> Generator[StepBatches]:
        while True:
            step += 1
            plan = self.order.plan(pairs_seen)
            yield self._make(plan, step)
            pairs_seen += len(plan.global_pairs)

    def _with_known_reference(self, step: StepBatches) -> StepBatches:
        """Return the step with cached log-probs, looked up now and not when prefetched: steps
        between may add them.
        """
        if self.cache is None:
            return step
        if step.epoch != self._epoch:  # in the last epoch, another rank may have had these pairs
            self._epoch = step.epoch
            self.cache.read()
        batches = [
            batch._replace(ref_logps=self.cache.known(indices))
            for batch, indices in zip(step.micro_batches, step.indices, strict=True)
        ]
        return step._replace(micro_batches=batches)

    def _make(self, plan: StepPlan, step: int) -> StepBatches:
        context = self._context(step, plan.global_pairs)
        batches = [self._collate(micro, context) for micro in plan.micro_batches]
        are_local = isinstance(self.collator, AdaptedCollator)
        if are_local:
            counts = Counts.total(batch.counts for batch in batches)
        else:
            counts = self.counts_of(plan.global_pairs)
        indices = [micro.pairs for micro in plan.micro_batches]
        return StepBatches(
            plan.epoch,
            plan.pairs_seen + len(plan.global_pairs),
            batches,
            indices,
            counts,
            are_local,
        )

    def _collate(self, micro: MicroBatch, context: CollateContext) -> PairBatch:
        rows = [self.pairs[int(index)] for index in micro.pairs]
        if isinstance(self.collator, AdaptedCollator):
            return self.collator(rows, context, is_filler=micro.is_filler)
        return self.collator(rows, is_filler=micro.is_filler)

    def _context(self, step: int, pairs: Integers) -> CollateContext:
        tokens = int(self.order.tokens[pairs].sum())
        return CollateContext(self.order.rank, self.order.world_size, step, len(pairs), tokens)


def _prefetched(steps: Iterator[StepBatches]) -> Generator[StepBatches]:
    """Yield the same steps, prepared in a thread ahead of their use; the thread ends with the
    iterator.
    """
    ready: queue.Queue[StepBatches | BaseException] = queue.Queue(PREFETCHED_STEPS)
    stop = threading.Event()

    def put(item: StepBatches | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batches in steps:
                put(batches)
                if stop.is_set():
                    return
        except BaseException as error:  # raised again in the consumer
            put(error)

    thread = threading.Thread(target=produce, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # a thread that still runs torch code when the interpreter exits aborts the process
        thread.join()
