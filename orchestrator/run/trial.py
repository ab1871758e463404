"""A trainer that leaves nothing behind: one global batch learned by heart, or only looked at."""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainerCallback

from orchestrator.run.debug import joined
from orchestrator.run.prompt import debugger
from orchestrator.settings.counts import counted
from orchestrator.settings.spec import CheckpointSpec, EvaluationSpec, RunSpec, WandbSpec
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.given import NOTHING, Given
from orchestrator.training.metrics import MetricSums, means
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import Trainer
from orchestrator.training.worker import built
from orchestrator.world import World


class NothingToSave:
    """The session of a trainer that has no run to speak of: Ctrl-C simply ends it."""

    def heartbeat(self, step: int, phase: str) -> None:
        """Nobody looks."""

    def committed(self, step: int, path: Path) -> None:
        """Never called."""

    def stop_requested(self) -> str | None:
        """No one can."""
        return None

    def deadline(self) -> float | None:
        """None."""
        return None


@contextmanager
def nowhere(spec: RunSpec) -> Iterator[tuple[RunSpec, RunDir]]:
    """The settings of a trainer without what is done beside steps (no evaluation, no checkpoint, no user's callback, no
    W&B), and a run directory that is gone afterwards. Nothing but steps may be asked of it."""
    beside = {
        "evaluation": EvaluationSpec(),  # pyright: ignore[reportCallIssue]
        "checkpoint": CheckpointSpec(),  # pyright: ignore[reportCallIssue]
        "training": spec.training.model_copy(update={"pair_ledger": False}),
        "callbacks": [],
        "wandb": WandbSpec(mode="disabled"),  # pyright: ignore[reportCallIssue]
    }
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        yield spec.model_copy(update=beside), RunDir(Path(folder))


@contextmanager
def _on_first_batch(
    spec: RunSpec,
    world: World,
    given: Given,
    shown: Sequence[TrainerCallback] = (),
) -> Iterator[Trainer]:
    """A trainer at the start of the run, whose first global batch is all its data; shown: callbacks of this rank."""
    if spec.reference_cache == "lazy":
        # what was known of the reference would make a step cheaper than the first epoch's are, and what is new is not
        # to be kept
        spec = spec.model_copy(update={"reference": spec.reference.model_copy(update={"cache": "off"})})
    prepared = prepare(spec, given)
    with (
        nowhere(spec) as (bare, run_dir),
        built(
            bare,
            prepared,
            world,
            NothingToSave(),
            run_dir,
            given,
            callbacks=shown,
            first_batch_only=True,
        ) as trainer,
    ):
        yield trainer


class Learned(NamedTuple):
    """The losses of a batch learned by heart, in the first and in the last step."""

    steps: int
    pairs: int
    first: float
    last: float


def overfit(
    spec: RunSpec,
    given: Given = NOTHING,
    post_mortem: bool = False,
) -> Learned:
    """As many steps as the settings say, all on the first global batch: whatever can learn gets its loss near 0.

    It begins at the start of the run and leaves nothing behind.

    given: by a Python user, whose callbacks are not called.

    Raises:
        UserError: the settings or the data are wrong.
        TrainingError: training cannot go on.
    """
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"logging_steps": 1})})
    with joined(spec, post_mortem) as world, debugger(world, post_mortem):
        shown = [ConsoleCallback()] if world.is_main else []
        with _on_first_batch(spec, world, given, shown) as trainer:
            trainer.total_pairs = None  # steps alone are counted: some of a run's batches are smaller than this one
            trainer.callbacks.fire("on_train_begin")
            with closing(trainer.loader.steps(0, 0)) as steps:
                trainer.train(steps)
            trainer.callbacks.fire("on_train_end")
            losses = [logs["loss"] for logs in world.gather(trainer.callbacks.state.log_history)[0]]
            made = Learned(trainer.step, len(trainer.loader.pairs), losses[0], losses[-1])
            if world.is_main:
                after = (
                    f"after {counted(made.steps, 'step')} on the same {counted(made.pairs, 'pair')}; nothing was kept"
                )
                print(f"loss {made.first:.6f} at first, {made.last:.6f} {after}", flush=True)
            return made


class Tried(NamedTuple):
    """One forward and backward pass over a global batch."""

    pairs: int
    metrics: dict[str, float]
    grad_norm: float  # L2, before clipping
    seconds: float
    peak_bytes: int  # on the rank that took most: of the GPU's memory, or of the process on a CPU
    where: str


def dry_run(
    spec: RunSpec,
    given: Given = NOTHING,
    post_mortem: bool = False,
) -> Tried:
    """Everything built as for a run, and one forward and backward pass of its first global batch; no update.

    Nothing is written but caches.

    given: by a Python user, whose callbacks are not called.

    Raises:
        UserError: the settings or the data are wrong.
    """
    with (
        joined(spec, post_mortem) as world,
        debugger(world, post_mortem),
        _on_first_batch(spec, world, given) as trainer,
        closing(trainer.loader.steps(0, 0)) as steps,
    ):
        began = time.monotonic()
        outputs = trainer.micro_steps(next(steps))
        trainer.engine.finite()
        grad_norm = float(trainer.engine.optimizer_step(apply=False).grad_norm)
        seconds = time.monotonic() - began
        sums = MetricSums(world)
        for _, output in outputs:
            sums.add(output.metric_sums)
        made = Tried(len(trainer.loader.pairs), means(sums.totals()), grad_norm, seconds, *_peak(world))
        if world.is_main:
            _say(made)
        return made


def _say(made: Tried) -> None:
    print(f"forward and backward pass of the first {counted(made.pairs, 'pair')}: {made.seconds:.2f} s")
    print(f"loss {made.metrics['loss']:.6f}, gradient norm {made.grad_norm:.6g}")
    print(f"peak memory {made.peak_bytes / 2**20:,.0f} MB {made.where}, before the first update makes the ", end="")
    print("optimizer's state; nothing was kept", flush=True)


def _peak(world: World) -> tuple[int, str]:
    if world.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(world.device), "of the GPU's memory"
    else:
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the process"
    most = world.max(torch.tensor([peak], dtype=torch.int64, device=world.device))
    return int(most.item()), where
