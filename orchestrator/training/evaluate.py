"""The same step without gradient, over every evaluation pair once, sharded over the ranks."""

import time
from collections.abc import Callable

from orchestrator.data.collate import Counts
from orchestrator.data.loader import Loader
from orchestrator.engines.base import Engine
from orchestrator.training.metrics import MetricSums, means
from orchestrator.world import World


def evaluate(
    engine: Engine, loader: Loader, world: World, step: int, each: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Metrics with `eval_` before their names: exact for any world size, as fillers weigh nothing. Collective.

    each: called before each micro-batch.
    """
    began = time.monotonic()
    micro_batches, make = loader.whole(step)
    sums = MetricSums(world)
    for micro in micro_batches:
        each()
        sums.add(engine.evaluate(make(micro).to(world.device), Counts(len(loader.pairs), 1)).metric_sums)
    metrics = means(sums.totals())
    del metrics["num_tokens"]  # counts training only
    seconds = time.monotonic() - began
    timing = {"runtime": seconds, "samples_per_second": len(loader.pairs) / seconds}
    return {f"eval_{name}": value for name, value in {**metrics, **timing}.items()}
