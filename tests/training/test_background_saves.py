"""Background saves write what a save at once writes; their errors reach every rank."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.engines.base import Shard
from orchestrator.training import checkpoint_writer as module
from orchestrator.training.checkpoint_reader import Reader, newest_valid
from orchestrator.training.checkpoint_writer import RankState, SaveFailed, Saver
from orchestrator.training.manifest import (
    committed,
    verify,
)
from orchestrator.training.rng import rng_state, seed_everything
from orchestrator.world import World
from support.checkpoint_files import META, draws, full_disk, part, saved
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No part of a checkpoint is written before this is set."""
    opened, write = threading.Event(), module._Draft.write

    def held(draft: Any, *args: Any) -> Any:
        assert opened.wait(60)
        return write(draft, *args)

    monkeypatch.setattr(module._Draft, "write", held)
    yield opened
    opened.set()


def saver(folder: Path, world: World = ALONE, keep: int = 9, timeout_s: float = 10_000) -> Saver:
    return Saver(folder, world, keep, timeout_s)


def begin(saves: Saver, step: int) -> None:
    """A save in the background of a parameter of this rank's."""
    name = f"p{saves.world.rank}"
    saves.save(step, [part(name, (3,), 0, 3, step)], META, in_background=True)


def is_alone() -> bool:
    """Return whether no thread of a save is left."""
    return all(thread.name != "checkpoint" for thread in threading.enumerate())


def test_changes_after_the_start_of_a_save_do_not_reach_it(
    tmp_path: Path, gate: threading.Event
) -> None:
    storage, history, saves = torch.arange(24.0), [1], saver(tmp_path)
    strided, view = storage[:12:2], storage[12:]
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    owned = [
        Shard("a", (6,), 0, 6, {"param": strided, "step": storage[:1]}),
        Shard("b", (12,), 0, 12, {"param": view}),
    ]
    saves.save(1, owned, {"history": history}, in_background=True)
    assert saves.pop_committed() is None
    storage.fill_(-1)
    history.append(2)
    draws()
    gate.set()
    saves.wait()
    assert saves.pop_committed() == tmp_path / "step_00000001"
    assert saves.pop_committed() is None
    reader = Reader(tmp_path / "step_00000001")
    assert torch.equal(reader.parameter("a"), torch.arange(0.0, 12.0, 2))
    assert torch.equal(reader.parameter("b"), torch.arange(12.0, 24.0))
    assert reader.read("a", "step", 0, 1).item() == 0
    assert reader.meta["history"] == [1]
    reader.restore_rng(ALONE, seed=7)
    assert draws() == expected


def test_background_saves_write_the_same_files(tmp_path: Path) -> None:
    def work(world: World) -> None:
        seed_everything(3)
        mine = (
            [part("a", (3, 4), 0, 7)]
            if world.rank == 0
            else [part("a", (3, 4), 7, 12), part("b", (5,), 0, 5)]
        )
        for name in ("at once", "later"):
            saves = saver(tmp_path / name, world)
            saves.save(4, mine, META, RankState(rng_state()), in_background=name == "later")
            saves.wait()
            assert saves.pop_committed() == tmp_path / name / "step_00000004"

    assert on_ranks(2, work) == [None, None]
    at_once, later = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step_00000004").iterdir()}
        for name in ("at once", "later")
    )
    assert verify(tmp_path / "later" / "step_00000004") == []
    assert at_once == later


def test_no_two_saves_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, str]] = []
    write, commit, keep = module._Draft.write, module._Draft.commit, module.retain

    def slow(draft: Any, *args: Any) -> Any:
        done.append((draft.step, "begins"))
        time.sleep(0.05 * (draft.step % 2 + draft.world.rank))
        record = write(draft, *args)
        done.append((draft.step, "has written"))
        return record

    def committing(draft: Any, parts: Any) -> None:
        time.sleep(0.05)
        commit(draft, parts)
        done.append((draft.step, "is committed"))

    def keeping(folder: Path, *args: Any) -> None:
        time.sleep(0.05)
        keep(folder, *args)
        done.append((int(committed(folder)[0].name.removeprefix("step_")), "has retained"))

    monkeypatch.setattr(module._Draft, "write", slow)
    monkeypatch.setattr(module._Draft, "commit", committing)
    monkeypatch.setattr(module, "retain", keeping)

    def work(world: World) -> None:
        saves = saver(tmp_path, world, keep=2)
        for step in (1, 2, 3, 4):
            saves.save(step, [part(f"p{world.rank}", (3,), 0, 3)], META, in_background=step < 4)

    assert on_ranks(2, work) == [None, None]
    steps = [step for step, _ in done]
    assert steps == sorted(steps)
    stages = ["begins", "begins", "has written", "has written", "is committed", "has retained"]
    for step in (1, 2, 3, 4):  # a commit never precedes its files
        mine = [stage for other, stage in done if other == step]
        assert sorted(mine[:4]) + mine[4:] == stages
    assert [folder.name for folder in committed(tmp_path)] == ["step_00000004", "step_00000003"]


@pytest.mark.parametrize("then", ["the next save", "the end"])
@pytest.mark.parametrize(
    "fails", ["save_tensors", "synced_sha256", "write_atomically", "sync_folder"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_in_the_background_is_raised_everywhere_at_the_next_save_or_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, ranks: int, then: str
) -> None:
    older = saved(tmp_path, 2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def work(world: World) -> None:
        saves = saver(tmp_path, world)
        begin(saves, 3)
        if then == "the end":
            saves.wait()
        else:
            saves.save(4, [part(f"p{world.rank}", (3,), 0, 3)], META)

    with monkeypatch.context() as patch:
        # of write_atomically: not even the failure can be recorded
        patch.setattr(module, fails, full)
        results = on_ranks(ranks, work)
    for result in results:
        assert isinstance(result, SaveFailed)
        assert "the checkpoint of step 3 could not be written" in str(result)
        assert "No space left on device" in str(result)
    assert is_alone()
    assert newest_valid(tmp_path, ALONE) == (older, [])
    assert not list(tmp_path.glob(".*"))  # a full disk does not stay full of it


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_full_disk_of_one_rank_in_the_background_is_raised_on_all(
    tmp_path: Path, rank: int
) -> None:
    older = saved(tmp_path, 2)

    def work(world: World) -> None:
        saves = saver(tmp_path, world)
        size = 20_000 if world.rank == rank else 2  # only this rank writes more than fits
        values = Shard(f"p{world.rank}", (size,), 0, size, {"param": torch.zeros(size)})
        saves.save(3, [values], META, in_background=True)
        saves.wait()

    with full_disk(50_000):
        results = on_ranks(3, work)
    assert all(isinstance(result, SaveFailed) for result in results), results
    # and not what follows from it
    assert all(f"(rank {rank}: " in str(result) for result in results), results
    assert newest_valid(tmp_path, ALONE) == (older, [])
    assert list(tmp_path.iterdir()) == [older]


def test_a_failure_that_cannot_be_recorded_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = module._Draft.record

    def full(draft: Any, *args: Any) -> None:
        if draft.world.rank == 1:
            raise OSError(28, "No space left on device")
        record(draft, *args)

    monkeypatch.setattr(module._Draft, "record", full)

    def work(world: World) -> None:
        saves = saver(tmp_path, world)
        begin(saves, 3)
        saves.wait()

    results = on_ranks(2, work)
    assert all("(rank 1: OSError: [Errno 28] No space left" in str(result) for result in results), (
        results
    )
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_never_appears_is_waited_for_as_long_as_a_collective_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = module._Draft.record
    monkeypatch.setattr(
        module._Draft,
        "record",
        lambda draft, optimizer: draft.world.rank or record(draft, optimizer),
    )

    def work(world: World) -> None:
        saves = saver(tmp_path, world, timeout_s=0.1)
        begin(saves, 3)
        saves.wait()

    results = on_ranks(2, work)
    assert all("rank 1 has not written its part" in str(result) for result in results), results
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_has_failed_does_not_spoil_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = module._Draft.commit

    def failing(draft: Any, parts: Any) -> None:
        if draft.step == 3:
            raise OSError(28, "No space left on device")
        commit(draft, parts)

    monkeypatch.setattr(module._Draft, "commit", failing)

    def work(world: World) -> None:
        saves = saver(tmp_path, world)
        begin(saves, 3)
        with pytest.raises(SaveFailed):
            saves.wait()
        begin(saves, 4)
        saves.wait()
        assert saves.pop_committed() == tmp_path / "step_00000004"

    assert on_ranks(2, work) == [None, None]


def test_state_that_cannot_be_copied_is_raised_on_all(tmp_path: Path) -> None:
    def work(world: World) -> None:
        def owned() -> Iterator[Shard]:
            yield part(f"p{world.rank}", (3,), 0, 3)
            if world.rank == 1:
                raise RuntimeError("CUDA error")

        saver(tmp_path, world).save(3, owned(), META, in_background=True)

    assert ["CUDA error" in str(result) for result in on_ranks(2, work)] == [True, True]
    assert is_alone()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_waits_for_no_other_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be dead. What all have written is committed still."""
    gone, write = threading.Event(), module._Draft.write

    def late(draft: Any, *args: Any) -> Any:
        assert draft.world.rank == 0 or draft.step == 1 or gone.wait(60)
        return write(draft, *args)

    monkeypatch.setattr(module._Draft, "write", late)

    def work(world: World) -> None:
        saves = saver(tmp_path, world)
        begin(saves, 1)
        begin(saves, 2)
        if world.rank == 0:
            saves.close()
            gone.set()
        saves.close()

    assert on_ranks(2, work) == [None, None]
    assert is_alone()
    assert [folder.name for folder in committed(tmp_path)] == ["step_00000001"]
