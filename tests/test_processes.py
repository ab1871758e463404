"""No process outlives the one that started it, and the lock of a run lasts as long as its ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.processes import die_with_parent, handles_signals, process_state
from orchestrator.training.rundir import RunDir
from support.cluster_nodes import wait_until

STARTS_CHILD = """
import os, subprocess, sys, time
from functools import partial
from orchestrator.processes import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         preexec_fn=partial(die_with_parent, os.getpid()))
print(child.pid, flush=True)
time.sleep(600)
"""
STARTS_RAY = """
import subprocess, sys, time
from orchestrator.run.ray.guardian import guarded
with guarded(grace_s=0.1):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    if sys.argv[1] == "killed":
        time.sleep(600)
"""


def is_running(pid: int) -> bool:
    return process_state(pid) not in ("", "Z")


def test_a_rank_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_CHILD], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not is_running(child))


def test_a_child_whose_parent_is_dead_already_does_not_start() -> None:
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            die_with_parent(parent)  # its parent is another process
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("end", ["killed", "finished"])
def test_what_a_driver_started_for_ray_ends_with_it(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_RAY, end], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        child = int(driver.stdout.readline())
        if end == "killed":
            driver.kill()
    wait_until(lambda: not is_running(child))


def test_a_rank_has_begun_once_it_handles_signals() -> None:
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert not handles_signals(os.getpid())
        signal.signal(signal.SIGTERM, lambda *_: None)
        assert handles_signals(os.getpid())
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_the_lock_of_a_run_lasts_as_long_as_a_rank_that_inherits_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    with run_dir.owned() as lock:
        rank = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
    assert run_dir.owner() is not None
    rank.communicate(b"\n")
    assert run_dir.owner() is None
