"""Broken, half-written and unreadable checkpoints are named and passed over."""

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from orchestrator.training import checkpoint_writer as module
from orchestrator.training.checkpoint_reader import newest_valid
from orchestrator.training.manifest import (
    MANIFEST,
    committed,
    retain,
    verify,
)
from orchestrator.training.rng import rng_state
from support.checkpoint_files import BREAKS, META, flip, on_two_ranks, part, saved
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE


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
        dead.write([part("a", (3,), 0, 3)], rng_state())
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
    # killed right after the manifest went
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
    retain(tmp_path, 1)
    assert committed(tmp_path) == [folders[1]]
