"""Run the worker without Ray, in this process or in N processes of this machine: breakpoints
work.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.data.collate import UserCollator
from orchestrator.data.order import run_length
from orchestrator.engines.optim import Optimizers
from orchestrator.models.reference_function import RefModel
from orchestrator.run.local.prompt import debugger
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.callbacks.profiler import ProfilerCallback
from orchestrator.training.health import LocalSession
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.prepare import prepare
from orchestrator.training.result import RunResult, finished_already, finished_line
from orchestrator.training.rundir import RunDir
from orchestrator.training.user_objects import (
    ComputeMetrics,
    GivenCallback,
    UserObjects,
    check_arguments,
    check_spec,
)
from orchestrator.training.worker import run
from orchestrator.world import A_WEEK, World

POLL_S = 0.1
# set if the process that started this rank holds the lock of the run directory
OWNED = "ORCHESTRATOR_RUN_DIR_IS_OWNED"
GRACE_S = 10.0  # seconds for the other ranks to exit after one has failed

Steps = tuple[int, ...]
"""First and last step, counted from 1; empty: the third to the fifth step of this process."""


def debug(
    spec: RunSpec,
    *,
    ref_model: RefModel | None = None,
    optimizers: Optimizers | None = None,
    callbacks: Sequence[GivenCallback] | None = None,
    compute_metrics: ComputeMetrics | None = None,
    data_collator: UserCollator | None = None,
    post_mortem: bool = False,
    profile: Steps | None = None,
    **others: Any,
) -> RunResult:
    """Run the worker in this process; under torchrun (RANK, WORLD_SIZE) as one rank of several.

    ref_model to data_collator: objects used instead of the settings, as described in `UserObjects`.
    post_mortem: open a debugger before an exception propagates; also for callbacks, which are then
    not dropped. profile: steps whose trace each rank writes to RUN_DIR/profile.

    Raises:
        UserError: the settings or the data are wrong.
        TrainingError: training cannot continue.
    """
    check_spec(spec)
    check_arguments(others)
    given = UserObjects(ref_model, optimizers, callbacks, compute_metrics, data_collator)
    run_dir = RunDir(spec.run_dir)
    with joined(spec, post_mortem) as world, ExitStack() as held:
        if world.is_main and OWNED not in os.environ:
            held.enter_context(run_dir.owned())
        held.enter_context(debugger(world, post_mortem))
        done = None
        if world.is_main:
            run_dir.check(spec)
            done = _finished_already(run_dir, profile)
            if done is not None:
                print(finished_line(run_dir), flush=True)
        done = world.gather(done)[0]
        if done is not None:
            return done
        steps = None
        if profile is not None:
            steps = _chosen(spec, prepare(spec, given).train.pairs_per_epoch, run_dir, profile)
        elif (
            world.size == 1
        ):  # with several ranks, none may wait in a collective while another tokenises
            prepare(spec, given)
        if world.is_main:
            run_dir.begin(spec)
        world.gather(None)  # the directory exists
        trace = run_dir.path / "profile" / f"rank_{world.rank:05d}.json"
        wrap_callbacks = partial(_observed, trace, steps, post_mortem)
        return run(spec, world, LocalSession(run_dir, world.rank), given, wrap_callbacks)


@contextmanager
def joined(spec: RunSpec, post_mortem: bool) -> Iterator[World]:
    """Yield the World of this process, and leave it at the end; with post_mortem, collectives do
    not time out.
    """
    world = World.join(
        int(A_WEEK.total_seconds()) if post_mortem else spec.cluster.collective_timeout_s
    )
    try:
        yield world
    finally:
        world.leave()  # an engine may have created a process group


def _observed(
    trace: Path, steps: tuple[int, int] | None, post_mortem: bool, callbacks: list[TrainerCallback]
) -> list[TrainerCallback]:
    """Return the callbacks of a rank, with options of debugging and the profiler."""
    if post_mortem:
        for callback in callbacks:
            callback.essential = True  # pyright: ignore[reportAttributeAccessIssue] - else dropped when it raises
    return callbacks if steps is None else [*callbacks, ProfilerCallback(trace, *steps)]


def _finished_already(run_dir: RunDir, profile: Steps | None) -> RunResult | None:
    done = finished_already(run_dir)
    if done is not None and profile is not None:
        rule = f"the run has finished after step {done.step}, so no step is left to profile"
        raise UserError("--profile", _written(profile), rule, "choose another run.name")
    return done


def _chosen(spec: RunSpec, per_epoch: int, run_dir: RunDir, profile: Steps) -> tuple[int, int]:
    """Return the first and the last step to profile, for a run with so many pairs per epoch.

    Raises:
        UserError: the steps are not among the remaining ones.
    """
    last = run_length(per_epoch, spec.batch.global_batch_size, spec.training).steps
    saved = committed(run_dir.checkpoints)
    taken = step_of(saved[0]) if saved else 0
    if not profile:  # the first two warm up
        return min(taken + 3, last), min(taken + 5, last)
    if not taken < profile[0] <= profile[-1] <= last:
        rule = f"the remaining steps of this run are {taken + 1} to {last}"
        raise UserError(
            "--profile", _written(profile), rule, f"for example --profile={taken + 1}:{last}"
        )
    return profile[0], profile[-1]


def _written(profile: Steps) -> str | bool:
    return ":".join(map(str, profile)) or True


def debug_ranks(
    spec: RunSpec,
    ranks: int,
    command: list[str],
    profile: Steps | None = None,
    keeps_run: bool = True,
) -> int:
    """Start `command` once per rank on this machine; return the first exit code that is not 0.

    Settings and data are checked here once, before any rank starts. When one rank fails, the others
    are ended. keeps_run: the ranks write to the run directory, which is locked meanwhile.
    """
    run_dir = RunDir(spec.run_dir)
    with ExitStack() as held:
        if keeps_run:
            held.enter_context(run_dir.owned())
            run_dir.check(spec)
            if _finished_already(run_dir, profile) is not None:
                print(finished_line(run_dir), flush=True)
                return 0
        prepared = prepare(spec)
        if profile is not None:
            _chosen(spec, prepared.train.pairs_per_epoch, run_dir, profile)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            OWNED: "1",
        }
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        return _wait(processes)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # Ctrl-C in a terminal reaches the ranks directly; TERM, and INT sent only to this process, is
    # forwarded
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR1, forward)
    signal.signal(signal.SIGINT, forward if not sys.stdin.isatty() else signal.SIG_IGN)
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() not in (None, 0, 3) for process in processes):
            failed_at = time.monotonic()
            forward(signal.SIGTERM, None)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            forward(signal.SIGKILL, None)
        time.sleep(POLL_S)
    codes = [
        code if code >= 0 else 1 for code in (process.returncode for process in processes)
    ]  # below 0: a signal
    if 2 in codes:  # a UserError of one rank is the reason; the others failed because of it
        return 2
    return next((code for code in codes if code not in (0, 3)), max(codes))
