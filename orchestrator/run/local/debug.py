"""Run the worker without Ray in this process, so that breakpoints work."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.data.user_collator import UserCollator
from orchestrator.engines.optim import Optimizers
from orchestrator.models.reference_function import RefModel
from orchestrator.run.local.profile import Steps, nothing_to_profile, steps_to_profile
from orchestrator.run.local.prompt import debugger
from orchestrator.settings.errors import StopRequested
from orchestrator.settings.run import RunSpec
from orchestrator.training.callbacks.profiler import ProfilerCallback
from orchestrator.training.deaths import record_crashes
from orchestrator.training.heartbeat import remove_heartbeats
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.ownership import TOKEN
from orchestrator.training.prepare import prepare
from orchestrator.training.result import RunResult, finished_already, finished_line
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from orchestrator.training.stops import heeding, write_stopped
from orchestrator.training.user_objects import (
    NOTHING,
    ComputeMetrics,
    GivenCallback,
    UserObjects,
    check_arguments,
    check_spec,
)
from orchestrator.training.watchdog import Watchdog, watched
from orchestrator.training.worker import run
from orchestrator.world import A_WEEK, World


def debug(
    spec: RunSpec,
    *,
    ref_model: RefModel | None = None,
    optimizers: Optimizers | None = None,
    callbacks: Sequence[GivenCallback] | None = None,
    compute_metrics: ComputeMetrics | None = None,
    data_collator: UserCollator | None = None,
    post_mortem: bool = False,
    **others: Any,
) -> RunResult:
    """Run the worker in this process; under torchrun (RANK, WORLD_SIZE) as one rank of several.

    ref_model to data_collator: objects used instead of the settings, as described in `UserObjects`.
    post_mortem: open a debugger before an exception propagates; also for callbacks, which are then
    not dropped.

    Raises:
        UserError: the settings or the data are wrong.
        TrainingError: training cannot continue.
    """
    check_spec(spec)
    check_arguments(others)
    user = UserObjects(ref_model, optimizers, callbacks, compute_metrics, data_collator)
    return run_here(spec, user, post_mortem)


def run_here(
    spec: RunSpec,
    user: UserObjects = NOTHING,
    post_mortem: bool = False,
    profile: Steps | None = None,
) -> RunResult:
    """Run the worker in this process, as `debug` does.

    profile: steps whose trace each rank writes to RUN_DIR/profile.
    """
    run_dir = RunDir(spec.run_dir)
    with joined(spec, post_mortem) as world, ExitStack() as held:
        if world.is_main and TOKEN not in os.environ:
            held.enter_context(run_dir.owned())
        held.enter_context(debugger(world, post_mortem))
        done = None
        if world.is_main:
            run_dir.check(spec)
            done = print_if_finished(run_dir, profile)
        done = world.gather(done)[0]
        if done is not None:
            return done
        steps, session = None, LocalSession(run_dir, world.rank)
        poll = heeding(partial(session.stop_requested, alone=True))
        if profile is not None:
            per_epoch = prepare(spec, user).train.pairs_per_epoch
            steps = steps_to_profile(spec, per_epoch, run_dir, profile)
        # with several ranks, none may wait in a collective while another tokenises
        elif world.size == 1:
            try:
                prepare(spec, user, poll)
            except StopRequested as stop:
                return write_stopped(run_dir, str(stop))
        if world.is_main:
            run_dir.begin(spec)
            remove_heartbeats(run_dir)
        world.gather(None)  # the directory exists
        trace = run_dir.path / "profile" / f"rank_{world.rank:05d}.json"
        wrap_callbacks = partial(_with_debug_options, trace, steps, post_mortem)
        # with post_mortem, ranks wait without limit for one at the prompt
        if world.size > 1:
            record_crashes(run_dir, world.rank)
        watchdog = Watchdog(run_dir, world, spec, partial(_end, run_dir), not post_mortem)
        with watched(watchdog):
            session.watchdog = watchdog
            return run(spec, world, session, user, wrap_callbacks)


def _end(run_dir: RunDir, line: str, prints: bool) -> None:
    """End this process, whose run hangs."""
    try:
        if prints:
            print_hang(run_dir, line)
    finally:
        if not hasattr(sys, "ps1"):  # in an interactive session, the user decides
            os._exit(1)


def print_hang(run_dir: RunDir, line: str) -> None:
    """Print the line that names a hang, and where the run continues."""
    newest = committed(run_dir.checkpoints)
    where = f"step {step_of(newest[0])}" if newest else "the start"
    print(f"error: {line}; the same command continues from {where}", file=sys.stderr, flush=True)


def print_if_finished(run_dir: RunDir, profile: Steps | None) -> RunResult | None:
    """Print and return the result of a finished run; None if it has steps left.

    Raises:
        UserError: it has finished, but its steps should be profiled.
    """
    done = finished_already(run_dir)
    if done is not None:
        if profile is not None:
            raise nothing_to_profile(done, profile)
        print(finished_line(run_dir), flush=True)
    return done


@contextmanager
def joined(spec: RunSpec, post_mortem: bool) -> Iterator[World]:
    """Yield the World of this process, and leave it at the end.

    post_mortem: collectives do not time out.
    """
    a_week = int(A_WEEK.total_seconds())
    world = World.join(a_week if post_mortem else spec.cluster.collective_timeout_s)
    try:
        yield world
    finally:
        world.leave()  # an engine may have created a process group


def _with_debug_options(
    trace: Path, steps: tuple[int, int] | None, post_mortem: bool, callbacks: list[TrainerCallback]
) -> list[TrainerCallback]:
    """Return the callbacks of a rank, with options of debugging and the profiler."""
    if post_mortem:
        for callback in callbacks:
            # else it is dropped when it raises
            callback.essential = True  # pyright: ignore[reportAttributeAccessIssue]
    return callbacks if steps is None else [*callbacks, ProfilerCallback(trace, *steps)]
