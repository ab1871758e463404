"""A checkpoint exists when its manifest does: written whole, checked, read by ranges, and never
trusted when broken.
"""

import gc
import json
import random
import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from orchestrator.engines.base import Shard
from orchestrator.settings.errors import UserError
from orchestrator.training import checkpoint as module
from orchestrator.training.checkpoint import (
    CorruptCheckpoint,
    Reader,
    SaveFailed,
    Saver,
    newest_valid,
    save,
    seed_everything,
)
from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    ReadFailed,
    committed,
    retain,
    set_aside,
    verify,
)
from orchestrator.world import World
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE

META = {"pairs_seen": 8, "engine": {"scheduler": {"milestones": {2: 1, 10: 3}, "lr": [1e-5, 0.1]}}}


def part(name: str, shape: tuple[int, ...], start: int, stop: int, offset: float = 0.0) -> Shard:
    """The range of a parameter that counts upwards, with optimizer state."""
    values = torch.arange(start, stop, dtype=torch.float32) + offset
    return Shard(
        name, shape, start, stop, {"param": values, "exp_avg": -values, "step": torch.tensor([3.0])}
    )


def saved(folder: Path, step: int, world: World = ALONE) -> Path:
    return save(folder, step, [part("a", (3, 4), 0, 12, step), part("b", (5,), 0, 5)], META, world)


def on_two_ranks(folder: Path) -> list[Any]:
    """A checkpoint whose parameter `a` is cut between two ranks, and whose `b` belongs to the
    second.
    """

    def work(world: World) -> Path:
        seed_everything(100 + world.rank)
        mine = (
            [part("a", (3, 4), 0, 7)]
            if world.rank == 0
            else [part("a", (3, 4), 7, 12), part("b", (5,), 0, 5)]
        )
        return save(folder, 4, mine, META, world)

    return on_ranks(2, work)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- writing and reading --------------------------------------------------------------------------


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    folder = saved(tmp_path, 7)
    assert folder == tmp_path / "step_00000007"
    assert verify(folder) == []
    reader = Reader(folder)
    assert reader.meta == {**META, "step": 7, "world_size": 1}
    assert reader.shapes == {"a": (3, 4), "b": (5,)}
    assert reader.keys("a") == {"param", "exp_avg", "step"}
    assert torch.equal(reader.parameter("a"), torch.arange(7.0, 19.0).view(3, 4))
    assert torch.equal(reader.read("a", "exp_avg", 2, 5), -torch.tensor([9.0, 10.0, 11.0]))
    assert reader.read("a", "step", 0, 1).tolist() == [3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        dtype
    )
    values[:3] = torch.tensor([float("inf"), -0.0, float("nan")]).to(dtype)
    actual = Reader(
        save(tmp_path, 1, [Shard("a", (40,), 0, 40, {"param": values})], {}, ALONE)
    ).parameter("a")
    assert actual.dtype == dtype
    assert torch.equal(actual.view(torch.uint8), values.view(torch.uint8))


def test_scalars_and_empty_parameters(tmp_path: Path) -> None:
    scalar = Shard("scalar", (), 0, 1, {"param": torch.tensor([2.5]), "step": torch.tensor([9.0])})
    empty = Shard("empty", (0, 3), 0, 0, {"param": torch.zeros(0)})
    reader = Reader(save(tmp_path, 1, [scalar, empty], {}, ALONE))
    assert reader.parameter("scalar").shape == ()
    assert reader.read("scalar", "step", 0, 1).item() == 9.0
    assert reader.parameter("empty").shape == (0, 3)


def test_ranges_of_two_ranks_are_joined(tmp_path: Path) -> None:
    folders = on_two_ranks(tmp_path)
    assert folders == [tmp_path / "step_00000004"] * 2
    assert verify(folders[0]) == []
    reader = Reader(folders[0])
    assert torch.equal(reader.parameter("a"), torch.arange(12.0).view(3, 4))
    assert torch.equal(reader.parameter("b"), torch.arange(5.0))
    for start, stop in ((0, 12), (6, 8), (0, 7), (7, 12), (3, 4), (11, 12)):
        assert torch.equal(
            reader.read("a", "exp_avg", start, stop), -torch.arange(float(start), float(stop))
        )
    assert reader.read("a", "step", 0, 1).item() == 3.0
    assert reader.meta["world_size"] == 2


@pytest.mark.parametrize(
    ("name", "key", "start", "stop"),
    [
        ("a", "param", 0, 13),
        ("a", "param", 12, 13),
        ("a", "exp_avg_sq", 0, 1),
        ("c", "param", 0, 1),
    ],
)
def test_a_range_that_is_nowhere_is_refused(
    tmp_path: Path, name: str, key: str, start: int, stop: int
) -> None:
    reader = Reader(saved(tmp_path, 1))
    keys = reader.keys(name)
    with pytest.raises(CorruptCheckpoint, match=f"{key} of {name} are missing"):
        reader.read(name, key, start, stop)
    assert reader.keys(name) == keys  # asking changed nothing


def test_a_gap_between_ranks_is_refused(tmp_path: Path) -> None:
    gap = [part("a", (12,), 0, 5), part("a", (12,), 6, 12)]
    reader = Reader(save(tmp_path, 1, gap, {}, ALONE))
    with pytest.raises(CorruptCheckpoint, match="elements 5 to 12 of param of a"):
        reader.parameter("a")


def test_a_tensor_of_a_shape_of_its_own_is_kept_whole(tmp_path: Path) -> None:
    """Optimizer state need not have the parameter's shape, of which a rank may own any range."""
    state = {"param": torch.arange(6.0), "shaped:2,1:row_var": torch.tensor([3.0, 4.0])}
    reader = Reader(save(tmp_path, 1, [Shard("a", (3, 4), 6, 12, state)], {}, ALONE))
    assert reader.read("a", "param", 6, 12).tolist() == [0, 1, 2, 3, 4, 5]
    assert reader.read("a", "shaped:2,1:row_var", 0, 2).tolist() == [3, 4]


def test_integer_keys_survive_json(tmp_path: Path) -> None:
    meta = {
        "a": {1: "x", 2: {3: [1, 2]}},
        "b": {"1": 2},
        "empty": {},
        "tuple": (1, 2),
        "t": torch.tensor([1.5]),
    }
    expected = {**meta, "tuple": [1, 2], "t": [1.5], "step": 1, "world_size": 1}
    assert Reader(save(tmp_path, 1, [], meta, ALONE)).meta == expected


# --- broken checkpoints ---------------------------------------------------------------------------


def flip(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


BREAKS = {
    "a flipped bit": flip,
    "a file cut short": cut,
    "an emptied file": lambda folder: (folder / "index.json").write_text(""),
    "a missing file": lambda folder: (folder / "rng_00000.safetensors").unlink(),
    "a changed document": lambda folder: (folder / "meta.json").write_text('{"step": 3}'),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text()[:50]
    ),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "a manifest without files": lambda folder: (folder / MANIFEST).write_text('{"files": null}'),
}


def unreadable(path: Path) -> None:
    """Opening it fails with ELOOP, for root as well; its content is kept."""
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path)


def readable(path: Path) -> None:
    """Undo `unreadable`."""
    path.with_suffix(".kept").rename(path)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_checkpoint_is_named_and_the_older_one_is_used(
    tmp_path: Path, broken: str, ranks: int
) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 3)
    BREAKS[broken](newer)
    assert verify(older) == []
    assert verify(newer)
    for actual, complaints in on_ranks(ranks, lambda world: newest_valid(tmp_path, world)):
        assert actual == older
        assert complaints
        assert all("step_00000003" in line for line in complaints)


def test_without_a_manifest_there_is_no_checkpoint(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 3)
    (newer / MANIFEST).unlink()
    assert newest_valid(tmp_path, ALONE) == (older, [])
    assert committed(tmp_path) == [older]


def test_a_half_written_folder_is_ignored_and_written_over(tmp_path: Path) -> None:
    older = saved(tmp_path, 2)
    left = [
        tmp_path / "step_00000003",
        tmp_path / ".step_00000003.a1.partial",
        tmp_path / ".step_00000007.b2.partial",
    ]
    for folder in left:
        folder.mkdir()
        (folder / "rank_00000.safetensors").write_bytes(b"half")
        (folder / "rank_00001.safetensors").write_bytes(b"of another world size")
    assert newest_valid(tmp_path, ALONE) == (older, [])
    newer = saved(tmp_path, 3)
    assert newest_valid(tmp_path, ALONE) == (newer, [])
    assert not (newer / "rank_00001.safetensors").exists()
    assert sorted(tmp_path.iterdir()) == [older, newer]


def test_late_writes_of_a_dead_attempt_do_not_reach_a_checkpoint(tmp_path: Path) -> None:
    dead = module._Draft(tmp_path, 3, META, ALONE)
    draft = module._Draft(tmp_path, 3, META, ALONE)
    with pytest.raises((OSError, SafetensorError)):
        dead.write([part("a", (3,), 0, 3)], module.rng_state())
    with pytest.raises(OSError):
        dead.record({})
    assert list(draft.partial.iterdir()) == []


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    flip(saved(tmp_path, 3))
    again = saved(tmp_path, 3)
    assert verify(again) == []


def test_without_a_valid_checkpoint_none_is_returned(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere", ALONE) == (None, [])
    flip(saved(tmp_path, 1))
    actual, complaints = newest_valid(tmp_path, ALONE)
    assert actual is None
    assert len(complaints) == 1


def test_ranks_share_the_checking(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    flip(folder)
    (folder / "rng_00000.safetensors").unlink()
    shares = [verify(folder, (rank, 3)) for rank in range(3)]
    assert sorted(line for lines in shares for line in lines) == sorted(verify(folder))
    assert len(verify(folder)) == 2


def test_every_file_is_in_the_manifest(tmp_path: Path) -> None:
    folder = on_two_ranks(tmp_path)[0]
    listed = set(json.loads((folder / MANIFEST).read_text())["files"])
    assert listed == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert len(listed) == 6


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folders = [saved(tmp_path, step) for step in (2, 9, 10, 100)]
    (folders[1] / MANIFEST).unlink()
    retain(tmp_path, 2)
    assert committed(tmp_path) == [folders[3], folders[2]]
    assert not folders[0].exists()
    retain(tmp_path, 2)
    assert [path.exists() for path in folders[2:]] == [True, True]
    retain(tmp_path, 1, best=folders[2])
    assert [path.exists() for path in folders[2:]] == [True, True]
    retain(tmp_path, 1, best=folders[3])
    assert committed(tmp_path) == [folders[3]]


def test_a_checkpoint_under_deletion_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [saved(tmp_path, step) for step in (1, 2)]
    monkeypatch.setattr(
        module.shutil, "rmtree", lambda *_, **__: None
    )  # killed right after the manifest went
    retain(tmp_path, 1)
    assert committed(tmp_path) == [folders[1]]


# --- errors while writing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fails", ["save_tensors", "synced_sha256", "write_atomically", "sync_folder"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_while_writing_is_raised_everywhere_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, ranks: int
) -> None:
    older = saved(tmp_path, 2)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, fails, full)
        results = on_ranks(ranks, lambda world: saved(tmp_path, 3, world))
    for result in results:
        assert isinstance(result, SaveFailed)
        assert "the checkpoint of step 3 could not be written" in str(result)
        assert "No space left on device" in str(result)
    assert newest_valid(tmp_path, ALONE) == (older, [])
    assert newest_valid(tmp_path, ALONE)[0] != saved(tmp_path, 3)
    assert newest_valid(tmp_path, ALONE)[0] == tmp_path / "step_00000003"


def test_a_full_disk_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    older = saved(tmp_path, 2)

    def work(world: World) -> Path:
        size = 20_000 if world.rank == 1 else 2  # only the second rank writes more than fits
        values = Shard(f"p{world.rank}", (size,), 0, size, {"param": torch.zeros(size)})
        return save(tmp_path, 3, [values], META, world)

    with full_disk(50_000):
        results = on_ranks(2, work)
    assert all(isinstance(result, OSError | SafetensorError) for result in results), results
    assert newest_valid(tmp_path, ALONE) == (older, [])


def test_a_folder_that_cannot_be_made_is_raised_on_all(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    results = on_ranks(2, lambda world: saved(tmp_path / "checkpoints", 3, world))
    assert all(isinstance(result, OSError) for result in results), results


def test_an_engine_that_fails_to_hand_out_its_state_is_raised_on_all(tmp_path: Path) -> None:
    def work(world: World) -> Path:
        def owned() -> Iterator[Shard]:
            yield part(f"p{world.rank}", (3,), 0, 3)
            if world.rank == 1:
                raise RuntimeError("CUDA error")

        return save(tmp_path, 3, owned(), META, world)

    results = on_ranks(2, work)
    assert ["CUDA error" in str(result) for result in results] == [True, True]


# --- in the background ----------------------------------------------------------------------------


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
            saves.save(4, mine, META, module.rng_state(), in_background=name == "later")
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
        patch.setattr(
            module, fails, full
        )  # of write_atomically: not even the failure can be recorded
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
    assert all(f"(rank {rank}: " in str(result) for result in results), (
        results
    )  # and not what follows from it
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


# --- random state ---------------------------------------------------------------------------------


def draws() -> list[float]:
    """Numbers of every generator, an odd count of the normal ones, whose second half a generator
    may keep.
    """
    normal = [np.random.randn(), random.gauss(0, 1), torch.randn(1).item()]
    return [
        *normal,
        np.random.rand(),
        random.random(),
        torch.rand(1).item(),
        float(torch.randint(1000, ())),
    ]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_random_state_comes_back_exactly(tmp_path: Path, before: int) -> None:
    seed_everything(3)
    for _ in range(before):
        draws()
    folder = saved(tmp_path, 1)
    expected = [draws() for _ in range(3)]
    seed_everything(99)
    Reader(folder).restore_rng(ALONE, seed=7)
    assert [draws() for _ in range(3)] == expected


def test_each_rank_has_its_own_random_state(tmp_path: Path) -> None:
    folder = on_two_ranks(tmp_path)[
        0
    ]  # threads share the generators: what matters is that each rank's file is read
    states = [
        module.load_file(folder / f"rng_{rank:05d}.safetensors")["torch"] for rank in range(2)
    ]
    for rank, state in enumerate(states):
        Reader(folder).restore_rng(World(rank, 2, rank, ALONE.device), seed=7)
        assert torch.equal(torch.get_rng_state(), state)


def test_another_world_size_draws_anew_from_seed_step_and_rank(tmp_path: Path) -> None:
    values = []
    for step, seed, rank in ((1, 7, 0), (1, 7, 1), (1, 80, 0), (2, 7, 0), (1, 7, 0)):
        Reader(saved(tmp_path, step)).restore_rng(World(rank, 2, rank, ALONE.device), seed)
        values.append(tuple(draws()))
    assert values[0] == values[-1]
    assert len(set(values)) == 4


def test_new_saves_outlive_a_corrupt_checkpoint_of_a_later_step(tmp_path: Path) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 20)
    (newer / "meta.json").write_text("{}")
    assert newest_valid(tmp_path, ALONE)[0] == older
    set_aside(tmp_path, older)
    checkpoint = saved(tmp_path, 5)
    retain(tmp_path, 1)
    assert committed(tmp_path) == [checkpoint]
    assert not newer.exists()  # swept with the leftovers of crashes


@pytest.mark.parametrize("broken", [name for name in BREAKS if "manifest" in name])
def test_an_unreadable_manifest_is_no_proof_against_the_files(tmp_path: Path, broken: str) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 20)
    BREAKS[broken](newer)
    assert newest_valid(tmp_path, ALONE)[0] == older
    set_aside(tmp_path, older)
    checkpoint = saved(tmp_path, 5)
    retain(tmp_path, 1)
    assert committed(tmp_path) == [checkpoint]  # it does not count, so that new ones stay
    assert (newer / "rank_00000.safetensors").exists()
    assert saved(tmp_path, 20) == newer
    retain(tmp_path, 1)
    assert committed(tmp_path) == [newer]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("files", [{"a": "b"}, None, []])
def test_another_format_is_refused_and_never_passed_over(
    tmp_path: Path, ranks: int, files: Any
) -> None:
    saved(tmp_path, 2)
    manifest = saved(tmp_path, 3) / MANIFEST
    manifest.write_text(json.dumps({"format": 99, "files": files}))
    for refusal in on_ranks(ranks, lambda world: newest_valid(tmp_path, world)):
        assert isinstance(refusal, UserError)
        assert str(refusal) == (
            f"{manifest} format = 99: this version reads format {FORMAT}; "
            "use the version of this program that wrote it, or choose another run.name"
        )
    assert len(committed(tmp_path)) == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "meta.json", MANIFEST])
def test_a_file_that_cannot_be_read_this_time_is_not_corrupt(
    tmp_path: Path, ranks: int, name: str
) -> None:
    saved(tmp_path, 2)
    newer = saved(tmp_path, 3)
    unreadable(newer / name)
    for failure in on_ranks(ranks, lambda world: newest_valid(tmp_path, world)):
        assert isinstance(failure, ReadFailed)
        assert str(failure).startswith(
            f"{newer / name} cannot be read now (Too many levels of symbolic links); "
        )
        assert "\n" not in str(failure)
    readable(newer / name)
    assert newest_valid(tmp_path, ALONE) == (newer, [])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, ranks: int) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved(checkpoints, 2)
    unreadable(checkpoints)
    assert all(
        isinstance(actual, ReadFailed)
        for actual in on_ranks(ranks, lambda world: newest_valid(checkpoints, world))
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("broken", [unreadable, lambda path: path.write_text('{"format": 99}')])
def test_a_refusal_keeps_no_frame_alive(
    tmp_path: Path, ranks: int, broken: Callable[[Path], Any]
) -> None:
    """A process group that lives until the interpreter ends, held by a frame of a traceback, aborts
    the process.
    """
    broken(saved(tmp_path, 2) / MANIFEST)

    class Engine:
        pass

    def is_held(world: World) -> bool:
        seen = []

        def run() -> None:
            engine = Engine()
            seen.append(weakref.ref(engine))
            newest_valid(tmp_path, world)

        with suppress(UserError, ReadFailed):
            run()
        return seen[0]() is not None

    gc.disable()
    try:
        assert on_ranks(ranks, is_held) == [False] * ranks
    finally:
        gc.enable()
