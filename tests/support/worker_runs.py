"""The worker on ranks that stay (ranks.Ranks), for many runs one after the other."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, get_args

from orchestrator.data.refcache import RECORD
from orchestrator.run.local.trial import NothingToSave
from orchestrator.settings.load import make_spec
from orchestrator.settings.precision import Precision
from orchestrator.settings.run import RunSpec
from orchestrator.training.assemble import assembled
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.worker import run
from orchestrator.world import World
from support.run_files import losses

# no CPU has TF32
PRECISIONS = [name for name in get_args(Precision) if name not in ("auto", "tf32")]
LOSS_NEEDS: dict[str, dict[str, Any]] = {"exo_pair": {"label_smoothing": 0.001}}
"""Settings that a loss cannot do without."""
LORA: dict[str, dict[str, Any] | None] = {
    "none": None,
    "lora": {"r": 4},
    "lora on bf16": {"r": 4, "base": "bf16"},
    "lora on int8": {"r": 4, "base": "int8"},
    "lora on nf4": {"r": 4, "base": "nf4"},
}
WITH_LORA, QUANTISED_BASE = set(LORA) - {"none"}, {"lora on int8", "lora on nf4"}
# How far the losses of twins may be apart, by whatever in a run computes most coarsely. Seen of
# each: fp64 5e-14, fp32 7e-7, fp16 1.5e-3, bf16 6e-3, and int8, which rounds activations to a scale
# that the micro-batch shares, 1.1e-2. Weights in nf4 are multiplied in the precision of the run.
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "int8": 3e-2}


def tolerance(precision: str, reference: str, lora: str) -> float:
    """Return by how much the losses of a run may differ from its twin's; lora: a key of LORA."""
    parts = {precision, reference, (LORA[lora] or {}).get("base")}
    return max(TOLERANCE[part] for part in parts & TOLERANCE.keys())


class WholeRun(NamedTuple):
    """Numbers that a run leaves."""

    losses: list[float]  # by step
    kept: int  # pairs whose reference log-probs are on disk


def whole_run(world: World, raw: dict[str, Any]) -> WholeRun:
    """A run by its settings, from its start to its export."""
    with begun(world, raw) as (spec, run_dir):
        run(spec, world, NothingToSave())
        world.gather(None)
        files = (spec.cache_dir / "reference_logps").glob("*/*.logps")
        return WholeRun(
            list(losses(run_dir.path).values()),
            sum(path.stat().st_size for path in files) // RECORD.itemsize,
        )


def curve(world: World, raw: dict[str, Any]) -> list[float]:
    """The loss by step of a run that is not evaluated, nor kept."""
    with (
        begun(world, raw) as (spec, run_dir),
        assembled(RunContext(spec, world, NothingToSave(), run_dir), prepare(spec)) as trainer,
        closing(trainer.steps()) as steps,
    ):
        trainer.callbacks.fire("on_train_begin")
        trainer.train(steps)
        return [line["loss"] for line in world.gather(trainer.callbacks.state.log_history)[0]]


def curves(world: World, raws: list[dict[str, Any]]) -> list[list[float]]:
    """`curve` of each, one after the other."""
    return [curve(world, raw) for raw in raws]


@contextmanager
def begun(world: World, raw: dict[str, Any]) -> Iterator[tuple[RunSpec, RunDir]]:
    """Settings and directory of a run that starts where no other has left log-probs of its
    reference.
    """
    spec = make_spec(raw)
    run_dir = RunDir(spec.run_dir)
    if world.is_main:
        shutil.rmtree(spec.cache_dir / "reference_logps", ignore_errors=True)
        run_dir.begin(spec)
    world.gather(None)
    yield spec, run_dir
    gc.collect()  # what DeepSpeed and FSDP tie in knots
