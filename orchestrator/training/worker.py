"""run(), the function that every rank runs: build the parts of a run, train, export."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, astuple, replace

from orchestrator.callback_api import TrainerCallback
from orchestrator.settings.errors import StopRequested
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
from orchestrator.training.stops import heeding, stopped_before_training
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
        try:
            prepared = _prepare(context, user)
            session.beat(0, "start")
            fitted = _train(context, prepared, user, wrap_callbacks, record)
        except StopRequested as stop:
            stopped = stopped_before_training(context.run_dir, str(stop))
            return _written(context, stopped, record)
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


def _prepare(context: RunContext, user: UserObjects) -> PreparedRun:
    """Prepare the run on this rank.

    Raises:
        StopRequested: on every rank, if one noticed meanwhile that the run should stop.
    """
    prepared, reason = None, None
    try:
        poll = heeding(lambda: context.session.stop_requested(alone=True))
        prepared = prepare(context.spec, user, poll)
    except StopRequested as stop:
        reason = str(stop)
        if context.world.size > 1:  # a rank that waits for this one's rows would begin them
            with suppress(OSError):
                context.run_dir.stop.write_text(reason)
    reasons = [each for each in context.world.gather(reason) if each is not None]
    if reasons or prepared is None:
        raise StopRequested(reasons[0])
    return prepared


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
    status, reason, step, checkpoint, best, best_metric = astuple(fitted)
    result = RunResult(status, reason, step, str(checkpoint), None, None, best, best_metric)
    if record is not None:
        # it may have been damaged since the start
        save_spec(context.spec, context.run_dir.config)
    if status == "finished":
        is_best = context.spec.checkpoint.export == "best" and best is not None
        model_step = best if is_best else step
        finished = replace(result, model=str(context.run_dir.model), model_step=model_step)
        # others do not wait: an export can take longer than a collective may
        result = _exported(context, prepared, finished) if context.world.is_main else finished
    return _written(context, result, record)


def _exported(context: RunContext, prepared: PreparedRun, result: RunResult) -> RunResult:
    """Export the model of a finished run and answer its samples; a stop leaves that to the next
    start.
    """
    spec, run_dir, poll = context.spec, context.run_dir, heeding(context.session.stop_requested)
    if spec.checkpoint.export == "best" and result.best_step is None:
        message = "no evaluation after a step had a number for %s: the last is exported"
        logger.warning(message, spec.evaluation.reported_best)
    assert result.model_step is not None
    checkpoint = step_folder(run_dir.checkpoints, result.model_step)
    try:
        export(run_dir, run_dir.model, checkpoint=checkpoint, poll=poll)
        samples = answered_samples(spec, run_dir, prepared, context.world.device, poll)
        return replace(result, samples=samples, files=finished_files(run_dir))
    except StopRequested as stop:
        reason = f"{stop}, before the export was complete"
        return replace(result, status="stopped", reason=reason, model=None, model_step=None)


def _written(context: RunContext, result: RunResult, record: Record | None) -> RunResult:
    """Close the record of this attempt and write result.json, both on rank 0; return the result."""
    if record is not None:
        record.close(result.status, result.reason)
        attempts = read_attempts(context.run_dir.attempts)
        result = replace(result, goodput=goodput(attempts))
        context.run_dir.write_result(asdict(result))
    return result
