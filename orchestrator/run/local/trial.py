"""Trial runs that write nothing: overfit one global batch, or run one forward and backward pass."""

import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from orchestrator.callback_api import TrainerCallback
from orchestrator.run.local.debug import joined
from orchestrator.run.local.prompt import debugger
from orchestrator.settings.checkpoint import CheckpointSpec
from orchestrator.settings.counts import counted
from orchestrator.settings.evaluation import EvaluationSpec
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trackers import WandbSpec
from orchestrator.training.assemble import assembled
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.context import RunContext
from orchestrator.training.heartbeat import Phase
from orchestrator.training.metrics import MetricSums, means
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import Trainer
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.world import World


class NothingToSave:
    """Session of a trainer without a run: nothing is saved, and Ctrl-C ends it."""

    def beat(
        self, step: int, phase: Phase, index: int = 0, pairs: torch.Tensor | None = None
    ) -> None:
        """Do nothing: nobody waits for a trial."""

    def fail(self, error: BaseException) -> None:
        """Do nothing: the exception is printed."""

    def stop_requested(self, alone: bool = False) -> str | None:
        """Return None: a trial cannot be stopped with a save."""
        return None


@contextmanager
def scratch_run(spec: RunSpec) -> Iterator[tuple[RunSpec, RunDir]]:
    """Yield settings with which a trainer can only run steps, and a temporary run directory.

    They are without evaluation, checkpoints, user callbacks and W&B.
    """
    updates = {
        "evaluation": EvaluationSpec(),  # pyright: ignore[reportCallIssue]
        "checkpoint": CheckpointSpec(),  # pyright: ignore[reportCallIssue]
        "training": spec.training.model_copy(update={"pair_ledger": False}),
        "callbacks": [],
        "wandb": WandbSpec(mode="disabled"),  # pyright: ignore[reportCallIssue]
    }
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        yield spec.model_copy(update=updates), RunDir(Path(folder))


@contextmanager
def _trainer_on_first_batch(
    spec: RunSpec, world: World, user: UserObjects, callbacks: Sequence[TrainerCallback] = ()
) -> Iterator[Trainer]:
    """Yield a trainer at the start of the run whose only data is the first global batch."""
    if spec.reference_cache == "lazy":
        # cached log-probs would make a step cheaper than those of the first epoch, and new ones
        # must not be written
        reference = spec.reference.model_copy(update={"cache": "off"})
        spec = spec.model_copy(update={"reference": reference})
    prepared = prepare(spec, user)
    with (
        scratch_run(spec) as (bare, run_dir),
        assembled(
            RunContext(bare, world, NothingToSave(), run_dir),
            prepared,
            user,
            callbacks=callbacks,
            first_batch_only=True,
        ) as trainer,
    ):
        yield trainer


class OverfitResult(NamedTuple):
    """Result of overfitting a batch: the losses of the first and the last step."""

    steps: int
    pairs: int
    first: float
    last: float


def overfit(spec: RunSpec, user: UserObjects = NOTHING, post_mortem: bool = False) -> OverfitResult:
    """Run all steps on the first global batch: a working setup brings the loss near 0.

    It starts at the start of the run and writes nothing.

    user: objects of a Python user; callbacks are not called.

    Raises:
        UserError: the settings or the data are wrong.
        TrainingError: training cannot continue.
    """
    training = spec.training.model_copy(update={"logging_steps": 1})
    spec = spec.model_copy(update={"training": training})
    with joined(spec, post_mortem) as world, debugger(world, post_mortem):
        callbacks = [ConsoleCallback()] if world.is_main else []
        with _trainer_on_first_batch(spec, world, user, callbacks) as trainer:
            # end by steps: some batches of a run are smaller than this one
            trainer.length = trainer.length._replace(pairs=None)
            trainer.callbacks.fire("on_train_begin")
            with closing(trainer.steps()) as steps:
                trainer.train(steps)
            trainer.callbacks.fire("on_train_end")
            losses = [logs["loss"] for logs in world.gather(trainer.callbacks.state.log_history)[0]]
            batch_size = len(trainer.loaders.train.pairs)
            result = OverfitResult(trainer.progress.step, batch_size, losses[0], losses[-1])
            if world.is_main:
                steps_taken, pairs = counted(result.steps, "step"), counted(result.pairs, "pair")
                after = f"after {steps_taken} on the same {pairs}; nothing was kept"
                print(f"loss {result.first:.6f} at first, {result.last:.6f} {after}", flush=True)
            return result


class DryRunResult(NamedTuple):
    """Result of one forward and backward pass over a global batch."""

    pairs: int
    metrics: dict[str, float]
    grad_norm: float  # L2, before clipping
    seconds: float
    peak_bytes: int  # largest peak over ranks: of GPU memory, or of the process on a CPU
    where: str


def dry_run(spec: RunSpec, user: UserObjects = NOTHING, post_mortem: bool = False) -> DryRunResult:
    """Build everything, and run a forward and backward pass of the first global batch; no update.

    Only caches are written.

    user: objects of a Python user; callbacks are not called.

    Raises:
        UserError: the settings or the data are wrong.
    """
    with (
        joined(spec, post_mortem) as world,
        debugger(world, post_mortem),
        _trainer_on_first_batch(spec, world, user) as trainer,
        closing(trainer.steps()) as steps,
    ):
        began = time.monotonic()
        outputs = trainer.forward_backward(next(steps))
        trainer.engine.grads_finite()
        grad_norm = float(trainer.engine.optimizer_step(apply=False).grad_norm)
        seconds = time.monotonic() - began
        sums = MetricSums(world)
        for _, output in outputs:
            sums.add(output.metric_sums)
        pairs, metrics = len(trainer.loaders.train.pairs), means(sums.totals())
        result = DryRunResult(pairs, metrics, grad_norm, seconds, *_peak_memory(world))
        if world.is_main:
            _print_result(result)
        return result


def _print_result(result: DryRunResult) -> None:
    pairs = counted(result.pairs, "pair")
    print(f"forward and backward pass of the first {pairs}: {result.seconds:.2f} s")
    print(f"loss {result.metrics['loss']:.6f}, gradient norm {result.grad_norm:.6g}")
    peak = f"peak memory {result.peak_bytes / 2**20:,.0f} MB {result.where}"
    later = "before the first update creates the optimizer state"
    print(f"{peak}, {later}; nothing was kept", flush=True)


def _peak_memory(world: World) -> tuple[int, str]:
    """Return the largest peak over ranks, and of what it is."""
    if world.device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(world.device), "of GPU memory"
    else:
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the process"
    most = world.max(torch.tensor([peak], dtype=torch.int64, device=world.device))
    return int(most.item()), where
