"""Evaluate every pair of a set once, sharded over ranks."""

import time
from collections.abc import Callable

import numpy as np
import torch

from orchestrator.data.collate import AdaptedCollator, Counts
from orchestrator.data.loader import Loader
from orchestrator.engines.base import Engine
from orchestrator.training.batch_losses import GlobalBatch
from orchestrator.training.compute_metrics import PairTable, UserMetrics
from orchestrator.training.metrics import MetricSums, means
from orchestrator.world import World


def evaluate(
    engine: Engine,
    loader: Loader,
    world: World,
    step: int,
    each: Callable[[], None] = lambda: None,
    by_token: bool = False,
    name: str = "",
    user: UserMetrics | None = None,
) -> dict[str, float]:
    """Return the metrics of a set with the prefix eval_ (eval_NAME_ for a named set). Collective.

    They are exact for any world size, because fillers have weight 0.

    each: called after each micro-batch. by_token: a loss is a mean over tokens, whose number a
    user's collator defines. name: name of the set, or "". user: the user's compute_metrics.
    """
    prefix = f"eval_{name}_" if name else "eval_"
    began = time.monotonic()
    micro_batches, make = loader.whole(step)
    counts = loader.counts_of(np.arange(len(loader.pairs)))
    if by_token and isinstance(loader.collator, AdaptedCollator):
        counts = over_ranks(world, Counts.total(make(micro).counts for micro in micro_batches))
    sums, dpo = MetricSums(world), engine.step.dpo
    seen = GlobalBatch(world) if dpo.needs_whole_batch else None
    table = PairTable(dpo) if user is not None and not user.logits else None
    cached = loader.cache
    known = cached is not None and all(
        cached.known(micro.pairs) is not None for micro in micro_batches
    )
    ask_all = engine.forward_is_collective and not world.all(known)
    for micro in micro_batches:
        batch = make(micro)
        if ask_all and cached is not None:
            batch = batch._replace(ref_logps=None)
        on_device = batch.to(world.device)
        output = engine.evaluate(on_device, counts)
        sums.add(output.metric_sums)
        if seen is not None:
            seen.add(on_device, output)
        if table is not None and not micro.is_filler:
            table.add(micro.pairs, batch, output)
        loader.remember(batch, output.ref_logps)
        each()
    if seen is not None:
        sums.add(seen.metric_sums(dpo))
    metrics = means(sums.totals())
    del metrics["num_tokens"]  # counts training only
    numbers: dict[str, float] = {}
    if user is not None:
        if table is None:
            handed = user.of_logits(engine, loader, world, step, each)
        else:
            handed = user.of_pairs(table, world, len(loader.pairs))
        where = f"evaluation{f' of {name}' * bool(name)} after step {step}"
        numbers = user.numbers(world, handed, prefix, where)
    seconds = time.monotonic() - began
    timing = {
        "runtime": seconds,
        "samples_per_second": len(loader.pairs) / seconds,
        "steps_per_second": len(micro_batches) / seconds,
    }
    return {f"{prefix}{metric}": value for metric, value in {**metrics, **timing}.items()} | numbers


def over_ranks(world: World, counts: Counts) -> Counts:
    """Return the sum of the counts over all ranks. Collective."""
    local = torch.tensor(counts, dtype=torch.float64, device=world.device)
    return Counts(*world.sum(local).tolist())
