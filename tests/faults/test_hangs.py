"""A rank that hangs, wherever and however, is named with its step and phase; the run goes on to
bitwise the same weights.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from faults.conftest import FaultRow
from support.command_line import orchestrator
from support.debug_runs import finish_debug, run_debug
from support.injector import Fault, fired_at, plan, words
from support.timeouts import scaled_timeout
from support.tiny_settings import write_settings

TESTS = Path(__file__).parents[1]
STEP = 6  # of the fault: a checkpoint is saved, and the step evaluated
POINTS = ("collator", "loss", "compute_metrics", "on_step_end")
PLACES = {
    "loss": "forward of micro-batch 1",
    "collator": "collate",
    "on_step_end": "callbacks",
    "compute_metrics": "evaluate of micro-batch 2",
    "on_save": "save",
}
OUTCOME = "named, stacks written, exit 1; the same command: bitwise"
CODE = {point: f"support.injector:{point}" for point in POINTS[:3]}
CODE |= {event: f"Callback.{event}" for event in ("on_step_end", "on_save")}


def settings_of(folder: Path, **blocks: Any) -> Path:
    cluster = {"hang_timeout_s": 2, "num_workers": 2, "preflight": False}
    every = {"every_steps": 3}
    blocks = {"training": {"max_steps": 10}, "checkpoint": every, "evaluation": every, **blocks}
    return write_settings(folder, cluster=cluster, **blocks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Weights of the run without a fault, with the user code of all points."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish_debug(settings_of(folder), *words(*POINTS), ranks=2)
    return weights(folder)


def command(*call: str | Path, env: dict[str, str], code: int = 0) -> str:
    """Return what a command prints to stderr; it must end with the code."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ended = orchestrator(*call, *words(*POINTS), env={"PYTHONPATH": path, **env})
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stderr


def weights(folder: Path) -> dict[str, bytes]:
    """The exported weights, bit by bit."""
    path = folder / "runs" / "tiny" / "model" / "model.safetensors"
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


def check_named(line: str, fault: Fault, folder: Path) -> None:
    """Check that the line names the fault's rank, step, phase and user code, and that all ranks
    wrote their stacks.
    """
    rank = fault.rank or 0
    assert f"rank {rank} on {os.uname().nodename}, step {STEP}, {PLACES[fault.point]}" in line
    what = f"hangs in {CODE[fault.point]} for " if fault.kind == "sleep" else "does not respond, as"
    assert what in line
    logs = folder / "runs" / "tiny" / "logs"
    stacks = [path.read_text() for path in sorted(logs.glob("stacks_*.txt"))]
    assert "injector.py" in stacks[rank]


# those of the default run first
ONE_SIDED = [
    Fault("sleep", "collator", STEP, rank=1),
    Fault("stop", "collator", STEP, rank=1),
    Fault("sleep", "loss", STEP, rank=1),
    Fault("hold_gil", "collator", STEP, rank=1),
    Fault("sleep", "on_step_end", STEP),
    Fault("sleep", "compute_metrics", STEP),
    Fault("sleep", "on_save", STEP),
]
EVERYWHERE = [
    Fault("stop", "loss", STEP, rank=None),
    Fault("sleep", "loss", STEP, rank=None),
    Fault("sleep", "collator", STEP, rank=None),
]


def named(fault: Fault) -> str:
    """Return a fault in words."""
    return f"{fault.kind} in {fault.point}, {'all ranks' if fault.rank is None else fault.rank}"


def cases(faults: list[Fault], in_default: int = 0) -> list[Any]:
    """Return the faults as parameters; but the first ones are slow."""
    marks = [[] if number < in_default else [pytest.mark.slow] for number in range(len(faults))]
    return [
        pytest.param(fault, id=named(fault), marks=mark)
        for fault, mark in zip(faults, marks, strict=True)
    ]


def newest_save(fault: Fault) -> int:
    """Return the step of the newest checkpoint when a fault happens; one is due after STEP."""
    return STEP if fault.point == "on_save" else STEP - 3


@pytest.mark.parametrize("fault", cases(ONE_SIDED, in_default=1))
def test_a_rank_that_hangs_is_named_and_the_same_command_resumes_bitwise(
    tmp_path: Path, fault: Fault, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    settings, planned = settings_of(tmp_path), plan(tmp_path, fault)
    ended = run_debug(settings, *words(*POINTS), ranks=2, env=planned)
    seconds = time.time() - fired_at(tmp_path)
    assert ended.codes[1 - (fault.rank or 0)] == 1, ended.log
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    check_named(line, fault, tmp_path)
    assert line.endswith(f"; the same command continues from step {newest_save(fault)}")
    finish_debug(settings, *words(*POINTS), ranks=2, env=planned)
    assert weights(tmp_path) == undisturbed
    fault_row("hang (debug)", named(fault), OUTCOME, seconds)


@pytest.mark.parametrize("fault", cases(EVERYWHERE))
def test_a_hang_of_all_ranks_is_noticed(
    tmp_path: Path, fault: Fault, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    settings, planned = settings_of(tmp_path), plan(tmp_path, fault)
    errors = command("debug", settings, "--nproc", "2", env=planned, code=1)
    seconds = time.time() - fired_at(tmp_path)
    check_named(errors, fault, tmp_path)
    assert f"; the same command continues from step {newest_save(fault)}" in errors
    command("debug", settings, "--nproc", "2", env=planned)
    assert weights(tmp_path) == undisturbed
    fault_row("hang (debug)", named(fault), OUTCOME, seconds)


@pytest.mark.slow
def test_the_only_rank_that_hangs_is_noticed(tmp_path: Path, fault_row: FaultRow) -> None:
    fault = Fault("sleep", "collator", STEP)
    settings, planned = settings_of(tmp_path), plan(tmp_path, fault)
    check_named(command("debug", settings, env=planned, code=1), fault, tmp_path)
    seconds = time.time() - fired_at(tmp_path)
    command("debug", settings, env=planned)
    whole = tmp_path / "whole"
    whole.mkdir()
    command("debug", settings_of(whole), env={})
    assert weights(tmp_path) == weights(whole)
    fault_row("hang (debug)", f"{named(fault)}, one process", OUTCOME, seconds)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", cases([*ONE_SIDED, *EVERYWHERE]))
def test_a_hang_on_ray_is_named_and_the_run_resumes_by_itself(
    tmp_path: Path, fault: Fault, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    settings, planned = settings_of(tmp_path), plan(tmp_path, fault)
    errors = command("train", settings, env=planned)
    seconds = time.time() - fired_at(tmp_path)
    [line] = [line for line in errors.splitlines() if "a worker died" in line]
    check_named(line, fault, tmp_path)
    assert f"); resuming from step {newest_save(fault)}" in line
    assert weights(tmp_path) == undisturbed
    fault_row("hang (Ray)", named(fault), "named, stacks written; resumed: bitwise", seconds)


@contextmanager
def started(
    settings: Path, planned: dict[str, str], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks of `orchestrator debug` in a process group of their own, killed at the end."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    call = ["debug", str(settings), "--nproc", "2", *words(*POINTS)]
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *call],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **planned},
        start_new_session=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + scaled_timeout(120)
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


LONGER = 15  # seconds: longer than the bounds of a step with these settings


@pytest.mark.slow
def test_a_run_that_is_suspended_with_ctrl_z_goes_on(
    tmp_path: Path, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    slow = plan(tmp_path, Fault("sleep", "collator", 2, rank=1, seconds=0.2, every=True))
    with started(settings_of(tmp_path), slow) as process:
        wait_for(tmp_path / "runs" / "tiny" / "metrics.jsonl")
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(LONGER)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(timeout=scaled_timeout(120)) == 0
    assert weights(tmp_path) == undisturbed
    fault_row("hang (debug)", f"all processes suspended for {LONGER} s", "went on: bitwise")


@pytest.mark.slow
def test_a_rank_at_a_breakpoint_is_waited_for(
    tmp_path: Path, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    planned = plan(tmp_path, Fault("breakpoint", "collator", STEP, rank=1))
    with started(settings_of(tmp_path), planned, stdin=subprocess.PIPE) as process:
        wait_for(tmp_path / "faults.0.1.0")
        time.sleep(LONGER)
        process.communicate(b"continue\n", timeout=scaled_timeout(120))
        assert process.returncode == 0
    assert weights(tmp_path) == undisturbed
    fault_row("hang (debug)", f"rank 1 at a breakpoint for {LONGER} s", "went on: bitwise")


@pytest.mark.slow
def test_a_slow_rank_is_named(
    tmp_path: Path, undisturbed: dict[str, bytes], fault_row: FaultRow
) -> None:
    settings = settings_of(tmp_path, training={"max_steps": 160})
    slow = plan(tmp_path, Fault("sleep", "collator", 1, rank=1, seconds=0.2, every=True))
    ended = run_debug(settings, *words("collator"), ranks=2, env=slow)
    assert ended.codes == [0, 0], ended.log
    [line] = re.findall("rank . on .* is slow, with .*", ended.log)
    assert f"rank 1 on {os.uname().nodename}, step " in line
    assert ", collate: is slow" in line
    assert "support.injector:collator takes the most" in line
    fault_row("straggler", "0.2 s more in the collator of rank 1", "named once, goes on")
