"""Heartbeats say where each rank is; what they show decides which rank hangs, or is slow."""

import cmd
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from orchestrator.training import watchdog as watchdog_module
from orchestrator.training.heartbeat import (
    BYTES,
    SILENT_S,
    Heartbeat,
    Observed,
    Observer,
    Phase,
    bound_of,
    decoded,
    hang_line,
    hung_ranks,
    remove_heartbeats,
    reported_hang,
)
from orchestrator.training.rundir import RunDir
from orchestrator.training.stragglers import STEPS, Stragglers
from orchestrator.training.watchdog import Clock, Watchdog, at_prompt, watched, watched_from_outside
from orchestrator.user_time import USER_TIME
from orchestrator.world import World
from support.timeouts import scaled_timeout
from support.tiny_settings import tiny_spec

HOST = "n7"
TIMEOUT_S = 300.0


def beat(rank: int, step: int = 8, phase: Phase = "collate", **changes: Any) -> Heartbeat:
    values: dict[str, Any] = {
        "index": 0,
        "order": 3,
        "age": 400.0,
        "bound": TIMEOUT_S,
        "timeout_s": TIMEOUT_S,
        "memory": -1,
        "user_code": None,
        "at_prompt": False,
        "seconds": {},
        "slowest_code": None,
        "time": 1e9,
        "pid": 1,
        "host": HOST,
    }
    return Heartbeat(rank=rank, step=step, phase=phase, **values | changes)


def seen(*beats: Heartbeat, silent: tuple[int, ...] = ()) -> list[Observed]:
    return [Observed(each, 900.0 if each.rank in silent else 1.0) for each in beats]


def hung(ranks: list[Observed], waited_out: bool = False) -> list[int]:
    return [each.beat.rank for each in hung_ranks(ranks, waited_out)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "TICK_S", 0.05)
    monkeypatch.setattr(watchdog_module, "SUSPENDED_S", 60.0)


def watchdog(
    run_dir: RunDir, on_hang: Callable[[str, bool], None], seconds: float = 1.0, **options: Any
) -> Watchdog:
    spec = tiny_spec(run_dir.path, cluster={"hang_timeout_s": 1})
    dog = Watchdog(run_dir, World(0, 1, 0, torch.device("cpu")), spec, on_hang, **options)
    dog.timeout_s = seconds and dog.timeout_s and seconds
    return dog


# --- which rank hangs -----------------------------------------------------------------------------


def test_the_rank_behind_hangs_and_not_those_that_wait_for_it() -> None:
    ahead = beat(0, order=5, phase="reduce"), beat(2, step=9, order=0)
    assert hung(seen(beat(1, user_code="my:collator"), *ahead)) == [1]


def test_a_rank_within_its_bound_does_not_hang_even_if_others_have_waited_for_longer() -> None:
    ranks = seen(beat(0, phase="callbacks", bound=1200.0), beat(1, order=4, phase="reduce"))
    assert hung(ranks) == []
    assert hung(ranks, waited_out=True) == [0]  # the collective of the others is about to raise


def test_nobody_is_named_because_of_a_wait_in_which_all_are_alike() -> None:
    assert hung(seen(beat(0, age=200.0), beat(1, age=200.0)), waited_out=True) == []


@pytest.mark.parametrize(
    ("changes", "silent", "expected"),
    [
        ({}, (), [0, 1]),
        ({"user_code": "my:loss"}, (), [1]),  # user code waits for nobody
        ({}, (1,), [1]),
    ],
)
def test_of_ranks_at_the_same_place_the_silent_one_or_that_in_user_code_hangs(
    changes: dict[str, Any], silent: tuple[int, ...], expected: list[int]
) -> None:
    assert hung(seen(beat(0), beat(1, **changes), silent=silent)) == expected


def test_a_silent_rank_hangs_once_its_silence_exceeds_its_bound() -> None:
    ranks = [Observed(beat(0, age=0.5), TIMEOUT_S - 1), Observed(beat(1, order=4), 1.0)]
    assert hung(ranks) == []
    assert hung([ranks[0]._replace(silent_s=TIMEOUT_S), ranks[1]]) == [0]


def test_a_rank_at_a_prompt_is_waited_for_and_one_that_is_done_is_not() -> None:
    assert hung(seen(beat(0, at_prompt=True), beat(1, order=9))) == []
    assert hung(seen(beat(0, phase="export", order=4), beat(1, phase="done", order=3))) == [0]


@pytest.mark.parametrize(
    ("phase", "longest", "is_busy", "expected"),
    [
        ("collate", 0.0, False, 300.0),
        ("callbacks", 0.0, False, 1200.0),
        ("save", 0.0, False, 1800.0),
        ("forward", 0.0, True, 3000.0),  # it may be a large model on a CPU
        ("forward", 100.0, False, 500.0),  # the run is as slow as that
        ("tokenise", 0.0, False, 86400.0),
    ],
)
def test_bounds_follow_the_phase_the_run_and_whether_the_process_computes(
    phase: Phase, longest: float, is_busy: bool, expected: float
) -> None:
    assert bound_of(phase, TIMEOUT_S, longest, is_busy) == expected


def test_the_line_names_rank_node_step_phase_and_user_code(run_dir: RunDir) -> None:
    for rank in (0, 1):
        run_dir.stacks(rank).touch()
    [line] = [hang_line(seen(beat(1, user_code="my:collator")), run_dir)]
    assert line == (
        "rank 1 on n7, step 9, collate: hangs in my:collator for 400 s; its stack is "
        f"{run_dir.stacks(1)}; those of other ranks are {run_dir.logs}/stacks_*.txt"
    )
    silent = hang_line(seen(beat(2, phase="save"), silent=(2,)), run_dir)
    assert silent.startswith("rank 2 on n7, step 8, save: does not respond, as its process or its")
    assert "for 1300 s; its stack could not be read" in silent


# --- heartbeats -----------------------------------------------------------------------------------


def test_a_heartbeat_keeps_its_size_and_a_damaged_one_is_not_read(run_dir: RunDir) -> None:
    content = beat(3, seconds={"collate": 1.5}).encoded()
    assert len(content) == BYTES
    assert decoded(content) == beat(3, seconds={"collate": 1.5})
    assert decoded(content[:100]) is None
    assert decoded(json.dumps({"step": 5, "phase": "train"}).encode()) is None  # an older version


def test_an_observer_counts_the_silence_of_a_file_that_stays_the_same(run_dir: RunDir) -> None:
    observer = Observer(run_dir, 2)
    run_dir.heartbeat(1).write_bytes(beat(1, age=1.0).encoded())
    assert [each.silent_s for each in observer.look(100.0)] == [0.0]
    [silent] = observer.look(100.0 + 2 * SILENT_S)
    assert (silent.is_silent, silent.age) == (True, 1.0 + 2 * SILENT_S)
    run_dir.heartbeat(1).write_bytes(beat(1, age=2.0).encoded())
    [again] = observer.look(200.0)
    assert (again.is_silent, again.age) == (False, 2.0)
    run_dir.hang.touch()
    remove_heartbeats(run_dir)
    assert os.listdir(run_dir.logs) == []


def test_the_file_says_where_the_rank_is_and_the_memory_where_it_is_now(run_dir: RunDir) -> None:
    dog = watchdog(run_dir, lambda *_: None, 0)
    with watched(dog):
        dog.beat(4, "collate")
        dog.beat(4, "forward", 2)
        published = decoded(run_dir.heartbeat(0).read_bytes())
        assert published is not None
        assert (published.phase, published.pid) == ("start", os.getpid())
        observer = Observer(run_dir, 1)
        observer.look(0.0)
        [stopped] = observer.look(2 * SILENT_S)
        assert (stopped.beat.step, stopped.beat.phase, stopped.beat.index) == (4, "forward", 2)
    last = decoded(run_dir.heartbeat(0).read_bytes())
    assert last is not None
    assert (last.phase, last.step) == ("done", 4)


def test_a_heartbeat_that_cannot_be_written_does_not_end_training(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watchdog_module.os, "open", full)
    with watched(watchdog(run_dir, lambda *_: None, 0)) as dog:
        dog.beat(1, "collate")


# --- the thread -----------------------------------------------------------------------------------


@pytest.fixture
def reports() -> list[tuple[str, bool]]:
    return []


@pytest.fixture
def noticed(
    run_dir: RunDir, quick: None, reports: list[tuple[str, bool]]
) -> Iterator[tuple[Watchdog, threading.Event]]:
    event = threading.Event()

    def on_hang(line: str, is_first: bool) -> None:
        reports.append((line, is_first))
        event.set()

    with watched(watchdog(run_dir, on_hang, 0.3)) as dog:
        yield dog, event


def test_a_rank_that_sleeps_in_user_code_is_named_with_its_stack(
    run_dir: RunDir,
    noticed: tuple[Watchdog, threading.Event],
    reports: list[tuple[str, bool]],
) -> None:
    dog, event = noticed
    dog.beat(11, "collate")
    with USER_TIME.of("my:collator"):
        assert event.wait(scaled_timeout(30))
    [(line, is_first)] = reports
    assert is_first
    assert "step 12, collate: hangs in my:collator" in line
    assert "test_a_rank_that_sleeps_in_user_code" in run_dir.stacks(0).read_text()
    assert reported_hang(run_dir) == line


def test_a_rank_ends_with_the_hang_that_another_one_reports(
    run_dir: RunDir,
    noticed: tuple[Watchdog, threading.Event],
    reports: list[tuple[str, bool]],
) -> None:
    dog, event = noticed
    dog.beat(3, "tokenise")
    run_dir.hang.write_text("rank 1 hangs\n")
    assert event.wait(scaled_timeout(30))
    assert reports == [("rank 1 hangs", False)]
    assert run_dir.stacks(0).exists()


def test_a_rank_that_waits_at_a_prompt_does_not_hang(
    noticed: tuple[Watchdog, threading.Event],
    reports: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dog, event = noticed
    assert not at_prompt()
    dog.beat(3, "collate")

    class Prompt(cmd.Cmd):  # as pdb is one
        def do_continue(self, _: str) -> bool:
            return True

    def user(_: object) -> str:
        assert at_prompt()
        assert not event.wait(1.0)
        return "continue"

    monkeypatch.setattr("builtins.input", user)
    Prompt().cmdloop()
    assert reports == []


def test_a_suspended_process_does_not_count_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3601.0, 3602.0, 3605.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = Clock()
    assert [clock.tick(), clock.tick(), clock.tick()] == [0.0, 3600.0, 0.0]
    assert clock.now == 3.0
    assert clock.tick(is_paused=True) == 3.0


def test_a_launcher_notices_that_no_rank_responds(
    run_dir: RunDir, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.training.heartbeat.SILENT_S", 0.2)
    lines: list[str] = []
    event = threading.Event()

    def on_hang(line: str, ranks: list[Observed]) -> None:
        lines.append(f"{line} {[each.beat.rank for each in ranks]}")
        event.set()

    run_dir.heartbeat(0).write_bytes(beat(0, phase="done", order=1).encoded())
    with watched_from_outside(run_dir, 3, on_hang):
        for rank in (1, 2):
            run_dir.heartbeat(rank).write_bytes(beat(rank, order=rank).encoded())
        assert event.wait(scaled_timeout(30))
    [line] = lines
    assert line.startswith("rank 1 on n7, step 9, collate: does not respond")
    assert line.endswith("[1, 2]")
    assert reported_hang(run_dir) is not None


# --- stragglers -----------------------------------------------------------------------------------


def compared(*seconds: dict[int, float], wall_s: float = 1.0) -> list[str]:
    """Return the lines of comparisons, between which ranks work so many seconds in each step."""
    stragglers = Stragglers()
    lines = list[str]()
    total = dict.fromkeys(seconds[0], 0.0)
    for number, per_step in enumerate(({}, *seconds)):
        total = {rank: total[rank] + STEPS * per_step.get(rank, 0.0) for rank in total}
        lines += stragglers.compare(
            beat(
                rank,
                step=STEPS * number,
                seconds={"collate": total[rank], "forward": 0.05 * STEPS * number},
                slowest_code="my:collator",
                time=STEPS * number * wall_s,
            )
            for rank in total
        )
    return lines


def test_a_straggler_is_named_once_with_its_node_and_what_it_spends_the_time_on() -> None:
    slow = {0: 0.1, 1: 0.8, 2: 0.1}
    [line] = compared(slow, slow, slow, slow)
    assert line.startswith(
        f"rank 1 on n7, step {2 * STEPS}, collate: is slow, with 0.85 s of own work in a step "
        "where other ranks take 0.15 s; of user code, my:collator takes the most"
    )


def test_a_slow_moment_or_a_small_part_of_a_step_makes_no_straggler() -> None:
    even, slow = {0: 0.1, 1: 0.1}, {0: 0.1, 1: 0.8}
    assert compared(slow, even, slow, even) == []
    assert compared(slow, slow, slow, wall_s=10.0) == []
