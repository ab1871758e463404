"""Files of a model folder that are missing, truncated or git-lfs pointers are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.models.model_files import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    check_files,
    check_weight_files,
)
from orchestrator.settings.errors import UserError

KEY = "model.path"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n"


def write_shards(folder: Path) -> list[Path]:
    """Write two files of weights and their index."""
    files = [folder / f"model-{n}-of-2.safetensors" for n in (1, 2)]
    for file in files:
        save_file({f"{file.stem}.weight": torch.ones(8, 8)}, file)
    index = {"metadata": {}, "weight_map": {f"{file.stem}.weight": file.name for file in files}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_weight_files(KEY, str(folder))
    return str(caught.value)


def test_whole_files_pass(tmp_path: Path) -> None:
    write_shards(tmp_path)
    check_weight_files(KEY, str(tmp_path))
    check_weight_files(KEY, "someone/on-the-hub")
    check_files(KEY, str(tmp_path), CONFIG_FILES)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "vocab.json"])
def test_a_pointer_beside_the_weights_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
        check_files(KEY, str(tmp_path), (*CONFIG_FILES, *TOKENIZER_FILES))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
)
def test_weights_that_are_a_pointer_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    assert f"{name} is a git-lfs pointer" in refusal(tmp_path)


def test_a_shard_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)[1].write_text(POINTER)
    assert "model-2-of-2.safetensors is a git-lfs pointer" in refusal(tmp_path)


def test_a_pointer_that_is_not_read_does_not_matter(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    check_weight_files(KEY, str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)[0].unlink()
    assert (
        "1 of the 2 files in model.safetensors.index.json are missing: model-1-of-2.safetensors"
        in refusal(tmp_path)
    )


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"weight_map": 3}'])
def test_an_index_that_is_not_one_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is not a valid index" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, 300])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = write_shards(tmp_path)[1]
    file.write_bytes(file.read_bytes()[:kept])
    assert ("is empty" if kept == 0 else "is truncated or corrupt") in refusal(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"<htm" + bytes(100))
    assert "model.safetensors is not a safetensors file" in refusal(tmp_path)
