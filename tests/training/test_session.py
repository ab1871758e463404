"""A run hears that it should stop."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from support.timeouts import scaled_timeout

WAITING = """
import sys, time
from pathlib import Path
from orchestrator.training.session import LocalSession
from orchestrator.training.rundir import RunDir
session = LocalSession(RunDir(Path(sys.argv[1])), 0)
print("ready", flush=True)
while session.stop_requested() is None:
    time.sleep(0.01)
print(session.stop_requested(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def session(run_dir: RunDir) -> LocalSession:
    """A session that leaves this process's signal handlers alone."""
    values: list[LocalSession] = []
    thread = threading.Thread(target=lambda: values.append(LocalSession(run_dir, 3)))
    thread.start()
    thread.join()
    return values[0]


@pytest.mark.parametrize(("rank", "expected"), [(0, "RUN_DIR/STOP exists"), (1, None)])
def test_the_stop_file_is_read_by_rank_zero(
    run_dir: RunDir, session: LocalSession, rank: int, expected: str | None
) -> None:
    session.rank = rank
    assert session.stop_requested() is None
    run_dir.stop.touch()
    assert session.stop_requested() == expected


def test_the_stop_file_says_who_requested_the_stop(run_dir: RunDir, session: LocalSession) -> None:
    session.rank = 0
    run_dir.stop.write_text("received SIGTERM\n")
    assert session.stop_requested() == "received SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop_and_the_second_ends_the_process(
    tmp_path: Path, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"received {number.name}\n"
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=scaled_timeout(10)) == -number
