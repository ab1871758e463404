"""The same step without gradient, over every evaluation pair once, sharded; and the reference alone, for its cache."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from orchestrator.data.collate import AdaptedCollator, Counts, PairBatch
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
    """Metrics with eval_ before their names: exact for any world size, as fillers weigh nothing. Collective.

    each: called after each micro-batch. by_token: the loss is a mean over tokens as well, which a user's collator has
    to be asked for first. name: of the evaluation set, where it has one; eval_NAME_ then. user: more metrics.
    """
    prefix = f"eval_{name}_" if name else "eval_"
    began = time.monotonic()
    micro_batches, make = loader.whole(step)
    counts = loader.counts_of(np.arange(len(loader.pairs)))
    if by_token and isinstance(loader.collator, AdaptedCollator):
        counts = over_ranks(world, Counts.total(make(micro).counts for micro in micro_batches))
    sums, dpo = MetricSums(world), engine.step.dpo
    seen = GlobalBatch(world) if dpo.sees_batch else None
    table = PairTable(dpo) if user is not None and not user.logits else None
    cached = loader.cache
    known = cached is not None and all(cached.known(micro.pairs) is not None for micro in micro_batches)
    ask_all = engine.meets_in_forward and not all_ranks(world, known)
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


def fill_reference_cache(
    engine: Engine, loader: Loader, world: World, each: Callable[[], None] = lambda: None
) -> tuple[int, float]:
    """Ask the reference about every pair that the cache does not know, dealt over the ranks. Collective.

    The micro-batches are those of the whole data set, whatever is known already: a fill that was interrupted ends with
    the last bit of one that was not. each: called before each micro-batch.

    Returns how many pairs were not known, and the seconds it took.
    """
    assert loader.cache is not None
    began = time.monotonic()
    micro_batches, make = loader.whole(step=0)
    [unknown, *_] = world.gather(len(loader.cache.unknown()))  # before anyone writes
    for micro in micro_batches:
        each()
        wanted = not micro.is_filler and loader.cache.known(micro.pairs) is None
        if not all_ranks(world, not wanted) if engine.meets_in_forward else wanted:  # then all ask, if one wants to
            batch = make(micro)
            ref_logps = engine.reference_logps(batch.to(world.device))
            if wanted:
                loader.remember(batch, ref_logps)
    world.gather(None)  # every rank has written
    loader.cache.read()
    return unknown, time.monotonic() - began


def all_ranks(world: World, true: bool) -> bool:
    """Whether it is true on all of them. Collective."""
    return not world.max(torch.tensor([not true], dtype=torch.int32, device=world.device)).item()


def over_ranks(world: World, counts: Counts) -> Counts:
    """Their sum over all ranks. Collective."""
    local = torch.tensor(counts, dtype=torch.float64, device=world.device)
    return Counts(*world.sum(local).tolist())


MEASURED = 4  # micro-batches of the first step on each rank, on which a reference is looked at before training


class LogpError(NamedTuple):
    """How far an approximate reference is from what it stands for."""

    pairs: int  # looked at, over all ranks
    largest: float  # of a sequence's log-prob, in nats
    mean: float  # over sequences, in nats
    margin: float  # largest of a pair's log-ratio (chosen minus rejected), in nats


def reference_error(
    engine: Engine, loader: Loader, exact: Callable[[PairBatch], torch.Tensor], world: World
) -> LogpError:
    """Compare the reference with `exact` (batch -> [2B]) on the first pairs of training. Collective."""
    mine: list[list[float]] = []
    for batch in loader.first()[:MEASURED]:
        on_device = batch.to(world.device)
        errors = (engine.reference_logps(on_device) - exact(on_device)).view(2, -1).t()  # of a filler, too: ranks meet
        mine += errors[batch.pair_weights.to(errors.device) > 0].tolist()
    found = torch.tensor([pair for pairs in world.gather(mine) for pair in pairs], dtype=torch.float64)
    sequences, margins = found.abs(), (found[:, 0] - found[:, 1]).abs()
    return LogpError(len(found), sequences.max().item(), sequences.mean().item(), margins.max().item())
