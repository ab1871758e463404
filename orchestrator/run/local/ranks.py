"""Start the ranks of a run as processes of this machine, without Ray, and wait for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

from orchestrator.run.local.debug import print_hang, print_if_finished
from orchestrator.run.local.profile import Steps, steps_to_profile
from orchestrator.settings.run import RunSpec
from orchestrator.training.heartbeat import Observed, remove_heartbeats
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.watchdog import watched_from_outside

POLL_S = 0.1
GRACE_S = 10.0  # seconds for the other ranks to exit after one has failed


def start_ranks(
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
            if print_if_finished(run_dir, profile) is not None:
                return 0
        prepared = prepare(spec)
        if profile is not None:
            steps_to_profile(spec, prepared.train.pairs_per_epoch, run_dir, profile)
        remove_heartbeats(run_dir)
        env = _environment(ranks)
        processes = [
            subprocess.Popen(command, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        with ExitStack() as watching:
            if keeps_run:
                end = partial(_end_hung, run_dir, processes)
                watching.enter_context(watched_from_outside(run_dir, ranks, end))
            return _wait(processes)


def _end_hung(
    run_dir: RunDir, processes: list[subprocess.Popen[bytes]], line: str, _: list[Observed]
) -> None:
    """End ranks of which none responds."""
    print_hang(run_dir, line)
    for process in processes:
        process.kill()


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment that all ranks share, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return env


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all ranks and end them when one fails; return the exit code of the run."""

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
    returned = [process.returncode for process in processes]
    codes = [code if code >= 0 else 1 for code in returned]  # below 0: a signal
    if 2 in codes:  # a UserError of one rank is the reason; the others failed because of it
        return 2
    return next((code for code in codes if code not in (0, 3)), max(codes))
