"""Train on Ray: prepare the run here, then start one attempt after another until it ends."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Literal

from orchestrator import early_signals
from orchestrator.data.user_collator import UserCollator
from orchestrator.engines.optim import Optimizers
from orchestrator.models.reference_function import RefModel
from orchestrator.run.checks import disk, preflight
from orchestrator.run.checks.report import raise_failed
from orchestrator.run.ray import capacity, elastic
from orchestrator.run.ray.attempt import run_attempt
from orchestrator.run.ray.cluster import entered
from orchestrator.run.ray.deaths import gone_ranks, is_out_of_memory, reason_of_death
from orchestrator.run.ray.logs import following, rank_log
from orchestrator.run.ray.objects import pickled_objects
from orchestrator.run.supervise import Attempt, Supervisor
from orchestrator.settings.errors import RunDied, StopRequested, TrainingError, UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.attempts import name_cause
from orchestrator.training.deaths import Death, first_death
from orchestrator.training.heartbeat import reported_hang
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.prepare import prepare
from orchestrator.training.result import RunResult, finished_already, finished_line
from orchestrator.training.rundir import RunDir
from orchestrator.training.stops import heeding, write_stopped
from orchestrator.training.user_objects import (
    ComputeMetrics,
    GivenCallback,
    UserObjects,
    check_arguments,
    check_spec,
)

logger = logging.getLogger(__name__)

OUTCOMES: dict[str, Literal["ended", "refused", "failed"]] = {
    "finished": "ended",
    "stopped": "ended",
    "refused": "refused",
    "failed": "failed",
}
"""Outcome of an attempt by the status in RUN_DIR/result.json."""


def train(
    spec: RunSpec,
    *,
    ref_model: RefModel | None = None,
    optimizers: Optimizers | None = None,
    callbacks: Sequence[GivenCallback] | None = None,
    compute_metrics: ComputeMetrics | None = None,
    data_collator: UserCollator | None = None,
    **others: Any,
) -> RunResult:
    """Train on Ray to the end, resuming from the last checkpoint whenever workers die.

    ref_model to data_collator: objects used instead of the settings (see `UserObjects`); each is
    copied to the workers and called there, so the objects of this process do not change. Ctrl-C (or
    RUN_DIR/STOP) saves and stops; a second Ctrl-C aborts. The same call again resumes.

    Raises:
        UserError: the settings, the data or the size of the cluster are wrong.
        TrainingError: training cannot continue.
        RunDied: the workers died too often.
    """
    check_spec(spec)
    check_arguments(others)
    user = UserObjects(ref_model, optimizers, callbacks, compute_metrics, data_collator)
    pickled = pickled_objects(spec, user)
    if spec.cluster.preflight:
        disk.check_answers(spec)
    run_dir = RunDir(spec.run_dir)
    with run_dir.owned():
        run_dir.check(spec)
        if (done := finished_already(run_dir)) is not None:
            print(finished_line(run_dir), flush=True)
            return done
        capacity.check_local_size(spec)
        if spec.cluster.preflight:
            space = disk.space_checks(spec, own_optimizer=optimizers is not None)
            raise_failed(preflight.check_here(spec) + space)
        try:  # raises errors of settings and data before Ray starts
            prepare(spec, user, heeding(run_dir.stop_reason))
        except StopRequested as stop:
            return write_stopped(run_dir, str(stop))
        run_dir.begin(spec)
        checked_nodes = set[str]()
        with entered(spec), _stop_on_signal(run_dir), following(rank_log(run_dir, 0)):
            return run_attempts(
                spec,
                run_dir,
                lambda wait_s: run_attempt(spec, run_dir, pickled, wait_s, checked_nodes),
            )


def run_attempts(
    spec: RunSpec, run_dir: RunDir, attempt: Callable[[float], Exception | None]
) -> RunResult:
    """Start one attempt after another until the run ends.

    Ray's own FailureConfig stays 0: it would retry from a checkpoint of its choice.

    attempt: seconds to wait for nodes -> the exception that ended the attempt, or None.
    """
    supervisor = Supervisor(spec.cluster.max_failures)
    wait_s, where = capacity.CLUSTER_WAIT_S, "the start"
    while True:
        run_dir.result.unlink(missing_ok=True)
        try:
            error = attempt(wait_s)
        except UserError as refused:
            if not supervisor.deaths:
                raise
            raise RunDied(f"{refused}; the same command continues from {where}") from None
        except capacity.StoppedWaiting:
            return write_stopped(run_dir, "while it waited for nodes")
        result = _result_of_attempt(run_dir)
        if elastic.is_growth_request(run_dir):
            run_dir.stop.unlink()
            if result["status"] == "stopped":
                continue
        newest = committed(run_dir.checkpoints)
        newest_step = step_of(newest[0]) if newest else -1
        death = first_death(run_dir, gone_ranks(error))
        died_at = death.step if death is not None else None
        action = supervisor.after(
            Attempt(OUTCOMES.get(result["status"], "died"), newest_step, died_at)
        )
        if action == "done":
            return RunResult(**result)
        if action == "refuse":
            raise UserError(*result["error"])
        if result["status"] == "failed":
            raise TrainingError(result["reason"])
        reason = reported_hang(run_dir) or _reason(error, death, run_dir)
        name_cause(run_dir.attempts, reason)
        where = f"step {newest_step}" if newest else "the start"
        if supervisor.died_twice_at is not None:
            step = supervisor.died_twice_at
            raise RunDied(
                f"two deaths at step {step} without a new checkpoint ({reason}); another attempt "
                f"would end there, too: fix the cause, or examine the step with orchestrator debug "
                f"{run_dir.path} --replay-step {step}; the same command continues from {where}"
            )
        if action == "give up":
            raise RunDied(
                f"deaths without a new checkpoint: {supervisor.deaths} ({reason}); see "
                f"{run_dir.logs}, or raise cluster.max_failures (now "
                f"{spec.cluster.max_failures}); the same command continues from {where}"
            )
        logger.warning("a worker died (%s); resuming from %s", reason, where)
        wait_s = spec.cluster.replacement_wait_s  # its node may be lost, too
        time.sleep(supervisor.backoff_s)


def _reason(error: Exception | None, death: Death | None, run_dir: RunDir) -> str:
    """Return what ended an attempt first: by what ranks left, else by what Ray reports."""
    if death is None:
        return reason_of_death(error, partial(rank_log, run_dir))
    monitor = "; Ray's memory monitor ended it" if is_out_of_memory(error) else ""
    return f"{death.line}{monitor}; see {rank_log(run_dir, death.rank)}"


def _result_of_attempt(run_dir: RunDir) -> dict[str, Any]:
    """Read how the workers ended; {"status": "died"} if they could not write it."""
    return run_dir.read_result() or {"status": "died"}


@contextmanager
def _stop_on_signal(run_dir: RunDir) -> Iterator[None]:
    """Handle stop signals: write the file STOP, so that workers save and stop.

    A second INT or TERM aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Slurm may send USR1 repeatedly, a shell and its terminal HUP
        if number in received and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt
        received.append(number)
        run_dir.stop.write_text(f"received {signal.Signals(number).name}")
        line = "stopping: the run saves after the last finished step; repeat to abort"
        print(line, file=sys.stderr, flush=True)

    early_signals.leave()  # else it would be back while Ray ends
    numbers = early_signals.stop_signals()
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
