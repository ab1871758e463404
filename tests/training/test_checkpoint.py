"""A checkpoint exists when its manifest does: written whole, checked, read by ranges, and never
trusted when broken.
"""

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from orchestrator.engines.base import Shard
from orchestrator.settings.errors import UserError
from orchestrator.training import checkpoint_writer as module
from orchestrator.training.checkpoint_reader import CorruptCheckpoint, Reader, newest_valid
from orchestrator.training.checkpoint_writer import SaveFailed, save
from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    SEAL,
    ReadFailed,
    committed,
    is_intact,
    retain,
    sealed,
    set_aside,
    verify,
)
from orchestrator.training.rng import seed_everything
from orchestrator.world import World
from support.checkpoint_files import BREAKS, META, draws, full_disk, on_two_ranks, part, saved
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE

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


def unreadable(path: Path) -> None:
    """Opening it fails with ELOOP, for root as well; its content is kept."""
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path)


def readable(path: Path) -> None:
    """Undo `unreadable`."""
    path.with_suffix(".kept").rename(path)


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
    # threads share the generators: what matters is that each rank's file is read
    folder = on_two_ranks(tmp_path)[0]
    states = [load_file(folder / f"rng_{rank:05d}.safetensors")["torch"] for rank in range(2)]
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
    manifest.write_text(json.dumps(sealed({"format": 99, "files": files})))
    for refusal in on_ranks(ranks, lambda world: newest_valid(tmp_path, world)):
        assert isinstance(refusal, UserError)
        assert str(refusal) == (
            f"{manifest} format = 99: this version reads format {FORMAT}; "
            "use the version of this program that wrote it, or choose another run.name"
        )
    assert len(committed(tmp_path)) == 2


@pytest.mark.parametrize("written", [4, 5, 6, 0, "4", None, 3.5])
def test_a_damaged_format_is_passed_over(tmp_path: Path, written: Any) -> None:
    older, manifest = saved(tmp_path, 2), saved(tmp_path, 3) / MANIFEST
    content = json.loads(manifest.read_text())
    assert is_intact(content)
    changed = {**content, "format": written, "step": 2 * content["step"]}
    manifest.write_text(json.dumps(changed))
    line = f"{manifest}: is not a manifest, or is damaged"
    assert newest_valid(tmp_path, ALONE) == (older, [line])


def test_a_manifest_of_an_earlier_version_has_no_seal(tmp_path: Path) -> None:
    manifest = saved(tmp_path, 3) / MANIFEST
    content = json.loads(manifest.read_text())
    del content[SEAL]
    manifest.write_text(json.dumps(content))
    assert verify(manifest.parent) == []
    manifest.write_text(json.dumps({**content, "format": 3}))
    with pytest.raises(UserError, match="format = 3"):
        verify(manifest.parent)
    manifest.write_text(json.dumps({**content, "format": 5}))  # later versions seal it
    assert verify(manifest.parent) == [f"{manifest}: is not a manifest, or is damaged"]


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
@pytest.mark.parametrize(
    "broken", [unreadable, lambda path: path.write_text(json.dumps(sealed({"format": 99})))]
)
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
