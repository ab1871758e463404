"""Evaluate every pair of each set once, sharded over ranks."""

import time
from collections.abc import Callable
from itertools import count

import numpy as np
import torch

from orchestrator.data.collate import Counts
from orchestrator.data.loader import Loader
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.engines.base import Engine
from orchestrator.settings.errors import StopRequested, UserError
from orchestrator.training.batch_losses import GlobalBatch
from orchestrator.training.compute_metrics import PairTable, UserMetrics
from orchestrator.training.context import RunContext
from orchestrator.training.metrics import TIMES, MetricSums, means
from orchestrator.training.reporter import Reporter
from orchestrator.training.rng import rng_state, set_rng_state
from orchestrator.training.stops import StopAgreement
from orchestrator.world import World


def evaluate_sets(
    context: RunContext,
    engine: Engine,
    loaders: dict[str, Loader],
    reporter: Reporter,
    user: UserMetrics | None,
) -> dict[str, float]:
    """Evaluate each set, report its metrics, and return those of all. Collective.

    An evaluation that was interrupted goes on with the first set that has no metrics yet
    (`Progress.evaluating`). loaders: by the name of the set.

    Raises:
        StopRequested: on every rank, if the run should stop.
        UserError: two sets have a metric of the same name, or the user's compute_metrics fails.
    """
    progress, step = reporter.progress, reporter.progress.step
    stops = StopAgreement(context.world, context.session)

    numbers = count(1)

    def after_batch() -> None:
        context.session.beat(step, "evaluate", next(numbers))
        reporter.callbacks.fire("on_prediction_step")
        stops.check()

    context.session.beat(step, "evaluate")
    metrics: dict[str, float] = {}
    done = progress.evaluating = progress.evaluating or {}
    for name, loader in loaders.items():
        if name in done:
            metrics |= done[name]
            continue
        rng = rng_state()
        try:
            of_set = evaluate(engine, loader, context.world, step, after_batch, name, user)
        except StopRequested:
            set_rng_state(rng, context.world.device)  # a user's collator may have drawn numbers
            raise
        if twice := metrics.keys() & of_set.keys():
            rule = f"two evaluation sets have a metric {min(twice)}"
            raise UserError("data.eval", name, rule, "rename that set")
        reporter.callbacks.fire("on_evaluate", metrics=reporter.report(of_set))
        metrics |= of_set
        done[name] = of_set
    progress.evaluating = None
    return metrics


def evaluate(
    engine: Engine,
    loader: Loader,
    world: World,
    step: int,
    after_batch: Callable[[], None] = lambda: None,
    name: str = "",
    user: UserMetrics | None = None,
) -> dict[str, float]:
    """Return the metrics of a set with the prefix eval_ (eval_NAME_ for a named set). Collective.

    They are exact for any world size, because fillers have weight 0.

    after_batch: called after each micro-batch. name: name of the set, or "". user: the user's
    compute_metrics.
    """
    prefix = f"eval_{name}_" if name else "eval_"
    began = time.monotonic()
    table = PairTable(engine.step.dpo) if user is not None and not user.logits else None
    metrics, micro_batches = _forward(engine, loader, world, step, after_batch, table)
    numbers: dict[str, float] = {}
    if user is not None:
        if table is None:
            calls = user.of_logits(engine, loader, world, step, after_batch)
        else:
            calls = user.of_pairs(table, world, len(loader.pairs))
        where = f"evaluation{f' of {name}' * bool(name)} after step {step}"
        numbers = user.numbers(world, calls, prefix, where)
    seconds = time.monotonic() - began
    metrics |= zip(
        TIMES, (seconds, len(loader.pairs) / seconds, micro_batches / seconds), strict=True
    )
    return {f"{prefix}{metric}": value for metric, value in metrics.items()} | numbers


def _forward(
    engine: Engine,
    loader: Loader,
    world: World,
    step: int,
    after_batch: Callable[[], None],
    table: PairTable | None,
) -> tuple[dict[str, float], int]:
    """Run all pairs of a set, and return the means of the metrics and the number of micro-batches.
    Collective.

    table: gets the output of each pair.
    """
    dpo, cache = engine.step.dpo, loader.cache
    micro_batches, make = loader.whole(step)
    counts = loader.counts_of(np.arange(len(loader.pairs)))
    is_mean_over_tokens = any(traits.is_token_mean for traits in dpo.traits)
    if is_mean_over_tokens and isinstance(loader.collator, AdaptedCollator):
        # a user's collator defines the number of tokens
        counts = over_ranks(world, Counts.total(make(micro).counts for micro in micro_batches))
    sums, whole_set = MetricSums(world), GlobalBatch(world) if dpo.needs_whole_batch else None
    is_cached = cache is not None and all(
        cache.known(micro.pairs) is not None for micro in micro_batches
    )
    runs_everywhere = engine.forward_is_collective and not world.all(is_cached)
    for micro in micro_batches:
        batch = make(micro)
        if runs_everywhere and cache is not None:
            batch = batch._replace(ref_logps=None)
        on_device = batch.to(world.device)
        output = engine.evaluate(on_device, counts)
        sums.add(output.metric_sums)
        if whole_set is not None:
            whole_set.add(on_device, output)
        if table is not None and not micro.is_filler:
            table.add(micro.pairs, batch, output)
        loader.remember(batch, output.ref_logps)
        after_batch()
    if whole_set is not None:
        sums.add(whole_set.metric_sums(dpo))
    metrics = means(sums.totals())
    del metrics["num_tokens"]  # counts training only
    return metrics, len(micro_batches)


def over_ranks(world: World, counts: Counts) -> Counts:
    """Return the sum of the counts over all ranks. Collective."""
    local = torch.tensor(counts, dtype=torch.float64, device=world.device)
    return Counts(*world.sum(local).tolist())
