"""Order, pairs, collator and reference cache -> the micro-batches of one rank, a step at a time, prefetched."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch

from orchestrator.data.collate import (
    AdaptedCollator,
    CollateContext,
    Counts,
    PackedCollator,
    PairBatch,
    PreferenceCollator,
)
from orchestrator.data.order import Integers, MicroBatch, Order, StepPlan, scored_chosen
from orchestrator.data.pairs import Pairs
from orchestrator.data.refcache import RefCache

Collator = PackedCollator | PreferenceCollator | AdaptedCollator

PREFETCHED_STEPS = 2


class StepBatches(NamedTuple):
    """The micro-batches of one optimizer step on this rank, and what their sums are divided by."""

    epoch: int
    pairs_seen: int  # after this step
    micro_batches: list[PairBatch]
    indices: list[Integers]  # of the pairs of each, in the data set
    counts: Counts  # of the global batch; of this rank alone where `are_local`
    are_local: bool  # a user's collator may change the counts: they still have to be summed over ranks


class Loader:
    """Makes steps from any position in the data. Our own collators run ahead in a thread; a user's runs in line,
    because it may draw random numbers, which must come in the same order after a resume."""

    def __init__(self, pairs: Pairs, order: Order, collator: Collator) -> None:
        self.pairs, self.order, self.collator = pairs, order, collator
        self.cache: RefCache | None = None  # of the reference's log-probs
        keep_last = None if isinstance(collator, AdaptedCollator) else collator.keep_last
        self._scored_chosen = scored_chosen(pairs.lengths, keep_last)
        self._epoch: int | None = None

    def steps(self, pairs_seen: int, step: int) -> Generator[StepBatches]:
        """Every step from a position on, without end; close it. `step`: optimizer steps taken before."""
        made = self._steps(pairs_seen, step)
        with closing(made if isinstance(self.collator, AdaptedCollator) else _prefetched(made)) as steps:
            for batches in steps:
                yield self._with_known_reference(batches)

    def first(self) -> list[PairBatch]:
        """This rank's micro-batches of the first step, as many as any rank's, without what the cache knows."""
        return self._make(self.order.plan(0), step=1).micro_batches

    def whole(self, step: int) -> tuple[list[MicroBatch], Callable[[MicroBatch], PairBatch]]:
        """Every pair once: this rank's micro-batches, and what makes a batch of one."""
        context = self._context(step, np.arange(self.order.pairs))
        if self.cache is not None:
            self.cache.read()

        def make(micro: MicroBatch) -> PairBatch:
            batch = self._collate(micro, context)
            return batch if self.cache is None else batch._replace(ref_logps=self.cache.known(micro.pairs))

        return self.order.whole(), make

    def batch(self, pairs: Integers, step: int) -> PairBatch:
        """The pairs at these indices as one batch of an evaluation, without what the cache knows."""
        return self._collate(MicroBatch(pairs), self._context(step, np.arange(self.order.pairs)))

    def counts_of(self, pairs: Integers) -> Counts:
        """Of these pairs, as our own collators lay them out; a user's may score other tokens."""
        scored = self._scored_chosen[pairs]
        if self.pairs.weights is None:
            return Counts(len(pairs), int(scored.sum()))
        weights = self.pairs.weights[pairs]
        return Counts(float(weights.sum()), float(weights @ scored))

    def remember(self, batch: PairBatch, ref_logps: torch.Tensor) -> None:
        """Keep what the reference said of a batch (still on the host) that came without; waits for the device.

        Not of a filler: its pair is in another rank's batch too, with another last bit.
        """
        if self.cache is not None and batch.ref_logps is None and batch.pair_weights.any():
            self.cache.add(batch.pair_ids, ref_logps)

    def _steps(self, pairs_seen: int, step: int) -> Generator[StepBatches]:
        while True:
            step += 1
            plan = self.order.plan(pairs_seen)
            yield self._make(plan, step)
            pairs_seen += len(plan.global_pairs)

    def _with_known_reference(self, made: StepBatches) -> StepBatches:
        """Looked up when the step is due, not when it is made: the steps between may have just answered it."""
        if self.cache is None:
            return made
        if made.epoch != self._epoch:  # a pair of this epoch may have been another rank's in the last one
            self._epoch = made.epoch
            self.cache.read()
        batches = [
            batch._replace(ref_logps=self.cache.known(indices))
            for batch, indices in zip(made.micro_batches, made.indices, strict=True)
        ]
        return made._replace(micro_batches=batches)

    def _make(self, plan: StepPlan, step: int) -> StepBatches:
        context = self._context(step, plan.global_pairs)
        batches = [self._collate(micro, context) for micro in plan.micro_batches]
        are_local = isinstance(self.collator, AdaptedCollator)
        counts = Counts.total(batch.counts for batch in batches) if are_local else self.counts_of(plan.global_pairs)
        indices = [micro.pairs for micro in plan.micro_batches]
        return StepBatches(plan.epoch, plan.pairs_seen + len(plan.global_pairs), batches, indices, counts, are_local)

    def _collate(self, micro: MicroBatch, context: CollateContext) -> PairBatch:
        rows = [self.pairs[int(index)] for index in micro.pairs]
        if isinstance(self.collator, AdaptedCollator):
            return self.collator(rows, context, is_filler=micro.is_filler)
        return self.collator(rows, is_filler=micro.is_filler)

    def _context(self, step: int, pairs: Integers) -> CollateContext:
        tokens = int(self.order.tokens[pairs].sum())
        return CollateContext(self.order.rank, self.order.world_size, step, len(pairs), tokens)


def _prefetched(steps: Iterator[StepBatches]) -> Generator[StepBatches]:
    """The same steps, made in a thread a little ahead of their use; the thread ends with the iterator."""
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
            for made in steps:
                put(made)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, who raises it
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
        thread.join()  # a thread that is inside torch when the interpreter ends aborts the process
