"""Two drivers of one run where the file system does not pass locks from one host to another."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.conftest import FaultRow
from orchestrator.settings.errors import UserError
from orchestrator.training import ownership
from orchestrator.training.rundir import RunDir
from support.debug_runs import Ended, run_debug
from support.run_files import metric_lines
from support.run_hooks import no_locks
from support.timeouts import scaled_timeout
from support.tiny_settings import write_settings

OWNS = """
import fcntl, sys, time
from pathlib import Path
fcntl.flock = lambda *_: None
from orchestrator.training.rundir import RunDir
with RunDir(Path(sys.argv[1])).owned():
    print("owns", flush=True)
    time.sleep(600)
"""
WATCHED_S = 3.0  # instead of STALE_S: three beats


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The directory of a run that has begun, on a file system without locks."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    monkeypatch.setattr(ownership, "STALE_S", WATCHED_S)
    (tmp_path / "config.yaml").touch()
    (tmp_path / ".owner").write_text(ownership.FREE)
    return RunDir(tmp_path)


@contextmanager
def other_owner(run_dir: RunDir) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the directory."""
    words = [sys.executable, "-c", OWNS, str(run_dir.path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as each:
        assert each.stdout is not None
        assert each.stdout.readline() == "owns\n"
        try:
            yield each
        finally:
            each.kill()


def test_an_owner_that_beats_is_not_joined_even_if_its_file_was_deleted(
    run_dir: RunDir, fault_row: FaultRow
) -> None:
    with other_owner(run_dir) as owner:
        rule = rf"is running already \(process {owner.pid} on {os.uname().nodename}; this file"
        for fault in ("a lock that only its own host sees", "the file of the lock deleted"):
            with pytest.raises(UserError, match=rule), run_dir.owned():
                pass
            fault_row("two drivers", fault, "the second is refused with host and process")
            assert run_dir.owner() == f"process {owner.pid} on {os.uname().nodename}"
            run_dir.lock.unlink()
    assert owner.wait() == -signal.SIGKILL


def test_an_owner_that_was_silent_ends_when_it_has_been_replaced(
    run_dir: RunDir, fault_row: FaultRow
) -> None:
    with other_owner(run_dir) as owner:
        owner.send_signal(signal.SIGSTOP)
        with run_dir.owned():
            owner.send_signal(signal.SIGCONT)
            assert owner.wait(scaled_timeout(20)) == 1
            assert owner.stderr is not None
            assert owner.stderr.read() == (
                f"error: run.name = {run_dir.path.name!r}: process {os.getpid()} on "
                f"{os.uname().nodename} has taken over this run, because this process gave no sign "
                "of life; it ends without saving, and the other continues\n"
            )
    fault_row("two drivers", "the first stopped for long, then continued", "the first ends, exit 1")


def test_a_killed_owner_of_this_machine_is_replaced_at_once(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_owner(run_dir) as owner:
        owner.kill()
        owner.wait()
    monkeypatch.setattr(ownership, "STALE_S", float("inf"))
    with run_dir.owned():
        pass
    assert run_dir.owner() is None


def test_an_owner_of_another_machine_is_replaced_when_it_no_longer_beats(run_dir: RunDir) -> None:
    owner = ownership.Owner(os.getpid(), "elsewhere", "another kernel", "token")
    run_dir.lock.write_bytes(owner.record(7))
    began = time.monotonic()
    with run_dir.owned():
        assert time.monotonic() - began >= WATCHED_S


def test_two_drivers_without_locks_train_one_run(tmp_path: Path, fault_row: FaultRow) -> None:
    """The second starts while the first trains; each step stands once in the metrics."""
    (tmp_path / "my_callbacks.py").write_text(WAITS)
    settings = write_settings(tmp_path, callbacks=["my_callbacks:Waits"])
    run_dir, results = tmp_path / "runs" / "tiny", list[Ended]()

    def first() -> None:
        results.append(run_debug(settings, hook=no_locks, cwd=tmp_path))

    thread = threading.Thread(target=first)
    thread.start()
    while not (run_dir / "waits").exists():
        assert thread.is_alive(), results
        time.sleep(0.05)
    second = run_debug(settings, hook=no_locks, cwd=tmp_path)
    (run_dir / "goes on").touch()
    thread.join()
    assert second.codes == [2], second.log
    assert "is running already (process" in second.stderr
    assert results[0].codes == [0], results[0].log
    assert [line["step"] for line in metric_lines(run_dir) if "loss" in line] == [1, 2, 3, 4]
    fault_row("two drivers", "locks not honoured, a run of 4 steps", "the second exits with 2")


WAITS = """
import time
from pathlib import Path
from transformers import TrainerCallback

class Waits(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        if state.global_step == 2:
            (folder / "waits").touch()
            while not (folder / "goes on").exists():
                time.sleep(0.05)
"""
