"""run(), the function that every rank runs: build the parts of a run, train, export."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

from orchestrator.callback_api import TrainerCallback
from orchestrator.settings.load import save_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training.assemble import assembled
from orchestrator.training.attempts import Record, goodput, read_attempts, recorded
from orchestrator.training.callbacks.attempt import AttemptCallback
from orchestrator.training.callbacks.build import build_callbacks
from orchestrator.training.checkpoint_reader import choose_checkpoint
from orchestrator.training.context import RunContext
from orchestrator.training.export import export
from orchestrator.training.manifest import step_folder
from orchestrator.training.ownership import followed
from orchestrator.training.prepare import PreparedRun, prepare, quiet
from orchestrator.training.result import FitResult, RunResult, finished_files
from orchestrator.training.rundir import RunDir
from orchestrator.training.samples import answered_samples
from orchestrator.training.session import Session
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.user_code import exit_is_error
from orchestrator.world import World

logger = logging.getLogger(__name__)

WrapCallbacks = Callable[[list[TrainerCallback]], list[TrainerCallback]]
"""Callbacks of a rank (empty except on rank 0) -> those to use instead."""


def run(
    spec: RunSpec,
    world: World,
    session: Session,
    user: UserObjects = NOTHING,
    wrap_callbacks: WrapCallbacks = list,
) -> RunResult:
    """Train one run on this rank, resuming if RUN_DIR has a complete checkpoint.

    user: functions and objects of a Python user; the settings define the rest.
    wrap_callbacks: for a debugger.

    Raises:
        UserError: the settings or the data are wrong, or RUN_DIR has checkpoints but none is
            usable.
        ReadFailed: the newest checkpoint cannot be read at the moment.
        TrainingError: training cannot continue.
    """
    quiet()
    context = RunContext(spec, world, session, RunDir(spec.run_dir))
    session.beat(0, "tokenise")
    nodes = len(set(world.gather(os.uname().nodename)))
    with (
        _reporting_failure(session),
        _recorded(context, nodes) if world.is_main else nullcontext() as record,
        exit_is_error(),  # also where no caller of user code has named it
    ):
        prepared = prepare(spec, user)
        session.beat(0, "start")
        fitted = _train(context, prepared, user, wrap_callbacks, record)
        session.beat(fitted.step, "export")
        gc.collect()  # before the export builds the whole model again
        return _finish(context, prepared, fitted, record)


@contextmanager
def _recorded(context: RunContext, nodes: int) -> Iterator[Record]:
    """Record this attempt, and end the process if another one takes the run over; on rank 0."""
    run_dir = context.run_dir
    with (
        followed(run_dir.lock, context.spec.run.name),
        recorded(run_dir.attempts, context.world.size, nodes) as record,
    ):
        yield record


@contextmanager
def _reporting_failure(session: Session) -> Iterator[None]:
    """Report the exception that leaves the block to the launcher."""
    try:
        yield
    except BaseException as error:
        session.fail(error)
        raise


def _train(
    context: RunContext,
    prepared: PreparedRun,
    user: UserObjects,
    wrap_callbacks: WrapCallbacks,
    record: Record | None,
) -> FitResult:
    """Train from the newest checkpoint; all parts of the run are freed when this returns."""
    checkpoint = choose_checkpoint(context.run_dir, context.world)
    callbacks: list[TrainerCallback] = []
    if context.world.is_main:
        callbacks = build_callbacks(context.spec, context.run_dir, user.callbacks)
    callbacks = wrap_callbacks(callbacks)
    if record is not None:
        callbacks = [AttemptCallback(record), *callbacks]
    with assembled(context, prepared, user, checkpoint, callbacks) as trainer:
        return trainer.fit()


def _finish(
    context: RunContext, prepared: PreparedRun, fitted: FitResult, record: Record | None
) -> RunResult:
    """Export the model of a finished run and write result.json, both on rank 0."""
    run_dir, best = context.run_dir, fitted.best_step
    exports_best = context.spec.checkpoint.export == "best"
    model_step = None
    if fitted.status == "finished":
        model_step = best if exports_best and best is not None else fitted.step
    result = RunResult(
        fitted.status,
        fitted.reason,
        fitted.step,
        str(fitted.checkpoint),
        None if model_step is None else str(run_dir.model),
        model_step,
        best,
        fitted.best_metric,
    )
    if record is None:  # not rank 0
        return result  # does not wait: an export can take longer than a collective may
    save_spec(context.spec, run_dir.config)  # it may have been damaged since the start
    if model_step is not None:
        if exports_best and best is None:
            message = "no evaluation after a step had a number for %s: the last is exported"
            logger.warning(message, context.spec.evaluation.reported_best)
        export(run_dir, run_dir.model, checkpoint=step_folder(run_dir.checkpoints, model_step))
        samples = answered_samples(context.spec, run_dir, prepared, context.world.device)
        result = replace(result, samples=samples, files=finished_files(run_dir))
    record.close(fitted.status, fitted.reason)
    result = replace(result, goodput=goodput(read_attempts(run_dir.attempts)))
    run_dir.write_result(asdict(result))
    return result
