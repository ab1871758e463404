"""A run that is killed or stopped goes on to bitwise the weights of an undisturbed one, and tells
each step once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support.command_line import orchestrator
from support.debug_runs import finish_debug, run_debug
from support.run_files import ledger_rows, losses, metric_lines, without_times
from support.run_hooks import at_step
from support.timeouts import scaled_timeout
from support.tiny_settings import write_settings

STEPS, EVERY = 60, 10  # so many that a signal from outside comes in the middle
LONG: dict[str, Any] = {
    # a window of the log is open at most checkpoints
    "training": {"max_steps": STEPS, "logging_steps": 3},
    "checkpoint": {"every_steps": EVERY, "keep": 3},
    "evaluation": {"every_steps": 25},
    "cluster": {"num_workers": 2},
}


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`orchestrator WORDS...` in a process group of its own, ended with all it started whatever
    happens.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the run has logged a step."""
    deadline = time.monotonic() + scaled_timeout(120)
    while not ((run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)


def weights(run_dir: Path) -> dict[str, bytes]:
    """The exported weights, bit by bit."""
    return {
        name: value.numpy().tobytes()
        for name, value in load_file(run_dir / "model" / "model.safetensors").items()
    }


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    assert weights(run_dir) == weights(undisturbed)
    lines, expected = metric_lines(run_dir), metric_lines(undisturbed)
    # each step once, in order
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    assert list(map(without_times, lines)) == list(map(without_times, expected))
    assert ledger_rows(run_dir) == ledger_rows(undisturbed)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(tmp_path_factory.mktemp("interrupted"), **LONG)


@pytest.fixture(scope="module")
def undisturbed(settings: Path) -> Path:
    finish_debug(settings, "run.name=undisturbed", ranks=2)
    return settings.parent / "runs" / "undisturbed"


@pytest.mark.ray
@pytest.mark.timeout(600)  # two starts of Ray beside another worker of the tests
def test_a_run_on_ray_outlives_a_killed_worker_and_ctrl_c(
    settings: Path, undisturbed: Path, shared_ray: dict[str, str]
) -> None:
    """It starts its own Ray, which Ctrl-C ends too, and goes on in another one."""
    run_dir = settings.parent / "runs" / "on-ray"
    with started("train", settings, "run.name=on-ray") as process:
        wait_for_step(run_dir, 2 * EVERY + 5, process)
        worker = json.loads((run_dir / "logs" / "heartbeat_00001.json").read_text())
        os.kill(worker["pid"], signal.SIGKILL)
        wait_for_step(run_dir, 3 * EVERY + 5, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everything in the group gets it
        out, errors = process.communicate(timeout=scaled_timeout(240))
    assert process.returncode == 3, errors
    assert "a worker died" in errors  # it really was killed in the middle
    assert f"resumed after step {2 * EVERY}" in out
    assert "the same command resumes" in out
    assert 3 * EVERY < max(losses(run_dir)) < STEPS
    again = orchestrator("train", settings, "run.name=on-ray", env=shared_ray)
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stdout
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("ranks", [1, 3])
def test_killed_debug_run_resumes_bitwise(settings: Path, ranks: int) -> None:
    """Three ranks: the order in which gloo sums depends on DDP's buckets, which must be settled
    before a resume too.
    """
    finish_debug(settings, f"run.name=whole{ranks}", ranks=ranks)
    run_dir, words = settings.parent / "runs" / f"dead{ranks}", [f"run.name=dead{ranks}"]
    dead = run_debug(
        settings, *words, ranks=ranks, hook=partial(at_step, EVERY + 5, signal.SIGKILL)
    )
    assert dead.codes == [-signal.SIGKILL] * ranks, dead.log
    assert not (run_dir / "model").exists()
    assert f"resumed after step {EVERY}" in finish_debug(settings, *words, ranks=ranks)
    assert_same_run(run_dir, settings.parent / "runs" / f"whole{ranks}")


def test_sigterm_in_debug_saves_and_resumes(settings: Path, undisturbed: Path) -> None:
    run_dir = settings.parent / "runs" / "terminated"
    with started("debug", settings, "--nproc", "2", "run.name=terminated") as process:
        wait_for_step(run_dir, EVERY + 5, process)
        process.send_signal(signal.SIGTERM)  # to the parent alone, which passes it on
        process.communicate(timeout=scaled_timeout(60))
    assert process.returncode == 3
    assert "resumed after step" in finish_debug(settings, "run.name=terminated", ranks=2)
    assert_same_run(run_dir, undisturbed)


def test_resume_at_another_world_size_sees_the_same_batches(
    settings: Path, undisturbed: Path
) -> None:
    run_dir, words = settings.parent / "runs" / "resized", ["run.name=resized"]
    stopped = run_debug(settings, *words, hook=partial(at_step, EVERY + 5, signal.SIGINT))
    assert stopped.codes == [3], stopped.log
    finish_debug(settings, *words, ranks=3)
    expected = losses(undisturbed)
    assert losses(run_dir) == pytest.approx(expected, abs=1e-5)
    for row, twin in zip(ledger_rows(run_dir), ledger_rows(undisturbed), strict=True):
        assert row == pytest.approx(twin, abs=1e-3)
