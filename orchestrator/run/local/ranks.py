"""Start the ranks of a run as processes of this machine, without Ray, and wait for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

from orchestrator import early_signals
from orchestrator.data.file_lock import no_poll
from orchestrator.processes import PARENT, die_with_parent, handles_signals
from orchestrator.run.local.debug import print_hang, print_if_finished
from orchestrator.run.local.profile import Steps, steps_to_profile
from orchestrator.settings.errors import DONE, FAILED, STOPPED, WRONG, StopRequested
from orchestrator.settings.run import RunSpec
from orchestrator.training.deaths import ending, first_death, remove_places
from orchestrator.training.heartbeat import Observed, remove_heartbeats, reported_hang
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.stops import heeding, write_stopped
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

    Raises:
        StoppedEarly: a signal arrived before the run began.
    """
    run_dir, lock = RunDir(spec.run_dir), tuple[int, ...]()
    with ExitStack() as held:
        if keeps_run:
            lock = (held.enter_context(run_dir.owned()),)
            run_dir.check(spec)
            if print_if_finished(run_dir, profile) is not None:
                return DONE
            run_dir.check_checkpoints()  # here, before the other ranks wait for rank 0
        poll = heeding(run_dir.stop_reason) if keeps_run else no_poll
        try:
            prepared = prepare(spec, poll=poll)
        except StopRequested as stop:
            write_stopped(run_dir, str(stop))
            return STOPPED
        if profile is not None:
            steps_to_profile(spec, prepared.train.pairs_per_epoch, run_dir, profile)
        if keeps_run:
            remove_heartbeats(run_dir)
            remove_places(run_dir)
        processes = _Ranks(run_dir if keeps_run else None)
        processes.start(command, _environment(ranks), lock)
        with ExitStack() as watching:
            if keeps_run:
                watching.enter_context(watched_from_outside(run_dir, ranks, processes.end_hung))
            processes.wait()
        if keeps_run:
            processes.print_first_death(run_dir)
        return processes.exit_code()


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment that all ranks share, with a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    env[PARENT] = str(os.getpid())
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return env


class _Ranks:
    """The processes of the ranks, and the signals that this process received for them."""

    def __init__(self, run_dir: RunDir | None) -> None:
        self.run_dir = run_dir  # None: nothing is kept
        self.processes: list[subprocess.Popen[bytes]] = []
        self.received: list[int] = []
        self.stopped_early = False
        self._gone: dict[int, str | None] = {}  # ranks that ended first, by a signal or exit code
        self._deadline: float | None = None  # for the other ranks, once one has ended badly
        for number in early_signals.stop_signals():
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        """Request a stop, or end the ranks if they have not begun; a second INT or TERM aborts."""
        is_repeated = number in self.received and number in (signal.SIGINT, signal.SIGTERM)
        self.received.append(number)
        if is_repeated:
            self.send(signal.SIGKILL)
        elif self.run_dir is None or not all(handles_signals(each.pid) for each in self.processes):
            self.stopped_early = True
            self.send(signal.SIGKILL)
        else:
            # not by a signal: a terminal or Slurm may have sent it to the ranks as well, and the
            # second one aborts
            self.run_dir.stop.write_text(f"received {signal.Signals(number).name}")

    def start(self, command: list[str], env: dict[str, str], lock: tuple[int, ...]) -> None:
        """Start the ranks, unless a signal arrives first.

        lock: descriptor that holds the lock of the run directory, until the last rank has ended.
        """
        for rank in map(str, range(int(env["WORLD_SIZE"]))):
            if self.received:
                self.stopped_early = True
                return
            process = subprocess.Popen(
                command,
                env={**env, "RANK": rank, "LOCAL_RANK": rank},
                preexec_fn=partial(die_with_parent, os.getpid()),
                pass_fds=lock,
            )
            self.processes.append(process)

    def send(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def end_hung(self, line: str, _: list[Observed]) -> None:
        """End ranks of which none responds."""
        assert self.run_dir is not None
        print_hang(self.run_dir, line)
        self.send(signal.SIGKILL)

    def wait(self) -> None:
        """Wait for all ranks; once one has failed, the others have GRACE_S to end."""
        while True:
            codes = [process.poll() for process in self.processes]
            if self.received and any(-code in self.received for code in codes if code):
                # by a signal that also reached the rank, which had no handler yet
                self.stopped_early = len(self.received) == 1
                self.send(signal.SIGKILL)
            failed = {rank: code for rank, code in enumerate(codes) if code and code != STOPPED}
            if failed and self._deadline is None:
                self._deadline = time.monotonic() + GRACE_S
                self._gone = {rank: ending(code) for rank, code in failed.items()}
                self.send(signal.SIGTERM)
            if None not in codes:  # only now: all may have ended since the last look
                return
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)

    def print_first_death(self, run_dir: RunDir) -> None:
        """Print what ended the run, unless it was a signal, the user's input or a hang."""
        was_expected = self.received or any(each.returncode == WRONG for each in self.processes)
        if was_expected or not self._gone or reported_hang(run_dir):
            return
        if death := first_death(run_dir, self._gone):
            print(f"error: {death.line}", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        """Return the exit code of the run once all ranks have ended.

        Raises:
            StoppedEarly: a signal arrived before the run began.
        """
        if self.stopped_early:
            raise early_signals.StoppedEarly(self.received[0])
        # below 0: a signal
        codes = [FAILED if each.returncode < 0 else each.returncode for each in self.processes]
        if WRONG in codes:  # a UserError of one rank is the reason; others failed because of it
            return WRONG
        return next((code for code in codes if code not in (DONE, STOPPED)), max(codes))
