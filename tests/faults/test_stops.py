"""A stop is heeded within a micro-batch in every phase, by all ranks at once; the same command goes
on with the numbers of an undisturbed run.
"""

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from faults.conftest import FaultRow
from support.debug_runs import Ended, finish_debug, run_debug
from support.run_files import ledger_rows, metric_lines, without_times
from support.run_hooks import signalled
from support.tiny_settings import write_settings

SETTINGS: dict[str, Any] = {
    "training": {"max_steps": 4, "logging_steps": 1},
    "checkpoint": {"every_steps": 2},
    "evaluation": {"at_start": True, "every_steps": 2, "samples": 1},
    "reference": {"cache": "full"},
}


class Stop(NamedTuple):
    """A stop of a run, and how the line about it begins."""

    phase: str
    call: int  # of the function of the phase, in this attempt
    number: int  # of the signal; 0: the file STOP
    rank: int | None  # None: whichever gets there
    line: str


TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
STOPS = [
    Stop("tokenise", 3, TERM, None, "stopped after step 0 (received SIGTERM, before its data"),
    Stop("fill", 2, TERM, 1, "stopped after step 0 (requested on another rank, with the reference"),
    Stop("fill", 2, 0, 0, "stopped after step 0 (RUN_DIR/STOP exists, with the reference cached"),
    Stop("evaluate", 1, TERM, 0, "stopped after step 0 (received SIGTERM, during the evaluation)"),
    Stop("evaluate", 3, USR1, 1, "stopped after step 2 (requested on another rank, during the eva"),
    Stop("evaluate", 4, TERM, 0, "stopped after step 4 (received SIGTERM, during the evaluation)"),
    Stop("export", 2, TERM, 0, "stopped after step 4 (received SIGTERM, before the export was com"),
    Stop("samples", 2, USR1, 0, "stopped after step 4 (received SIGUSR1, before the export was co"),
]


def stopped(settings: Path, name: str, stop: Stop, ranks: int, *words: str) -> Ended:
    """Run until the stop, which must end it; return its output."""
    run_dir = settings.parent / "runs" / name
    hook = partial(signalled, stop.phase, stop.call, stop.number, stop.rank)
    env = {"STOPPED_RUN": str(run_dir)}
    ended = run_debug(settings, f"run.name={name}", *words, ranks=ranks, hook=hook, env=env)
    # other ranks end before the export
    assert 3 in ended.codes, ended.log
    assert {*ended.codes} <= ({0, 3} if stop.phase in ("export", "samples") else {3}), ended.log
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "stopped"
    line = f"stopped after step {result['step']} ({result['reason']})"
    assert line.startswith(stop.line)
    if stop.phase == "fill":
        cached, pairs = re.findall(r"(\d+) of (\d+) training pairs", line)[0]
        assert 0 < int(cached) < int(pairs)
    return ended


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    model, expected = (
        load_file(each / "model" / "model.safetensors") for each in (run_dir, undisturbed)
    )
    assert all(model[name].equal(value) for name, value in expected.items())
    lines, expected_lines = metric_lines(run_dir), metric_lines(undisturbed)
    assert list(map(without_times, lines)) == list(map(without_times, expected_lines))
    assert ledger_rows(run_dir) == ledger_rows(undisturbed)
    results = [json.loads((each / "result.json").read_text()) for each in (run_dir, undisturbed)]
    assert results[0]["status"] == "finished"
    assert results[0]["samples"] == results[1]["samples"] != []


def check_stops(folder: Path, stops: list[Stop], ranks: int, *words: str) -> None:
    """Stop a run again and again, and compare it with one that was not stopped."""
    settings = write_settings(folder, **SETTINGS)
    finish_debug(settings, "run.name=whole", f"data.cache_dir={folder}/a", *words, ranks=ranks)
    words = (f"data.cache_dir={folder}/b", *words)
    for stop in stops:
        stopped(settings, "stopped", stop, ranks, *words)
    last = finish_debug(settings, "run.name=stopped", *words, ranks=ranks)
    assert "resumed after step" in last
    assert_same(folder / "runs" / "stopped", folder / "runs" / "whole")


def test_stops_in_every_phase_change_nothing(tmp_path: Path, fault_row: FaultRow) -> None:
    check_stops(tmp_path, STOPS, 2)
    for stop in STOPS:
        how = signal.Signals(stop.number).name if stop.number else "RUN_DIR/STOP"
        fault = f"{how} on rank {stop.rank or 0} of 2 while it runs {stop.phase}"
        fault_row("stopped in a phase", fault, "exit 3 within a micro-batch, rerun bitwise")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp"])
def test_stops_in_every_phase_of_every_engine(
    tmp_path: Path, fault_row: FaultRow, engine: str
) -> None:
    words = {
        "zero1": ["engine.kind=deepspeed", "engine.zero_stage=1"],
        "zero3": ["engine.kind=deepspeed", "engine.zero_stage=3"],
        "fsdp": ["engine.kind=fsdp"],
    }
    check_stops(tmp_path, STOPS, 2, *words[engine])
    outcome = "exit 3 within a micro-batch, rerun bitwise"
    fault_row("stopped in a phase", f"{len(STOPS)} stops of {engine}", outcome)


@pytest.mark.slow
def test_stops_of_one_rank_change_nothing(tmp_path: Path, fault_row: FaultRow) -> None:
    # it has twice as many micro-batches in an evaluation
    calls = {("evaluate", 4): 9}
    stops = [
        stop._replace(call=calls.get((stop.phase, stop.call), stop.call))
        for stop in STOPS
        if not stop.rank
    ]
    check_stops(tmp_path, stops, 1)
    outcome = "exit 3 within a micro-batch, rerun bitwise"
    fault_row("stopped in a phase", "6 stops of one rank", outcome)
