"""git-lfs pointers are named as what they are."""

from pathlib import Path

import pytest

from orchestrator.data.files import check_no_lfs_pointer, is_lfs_pointer
from orchestrator.settings.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4096\n"


@pytest.mark.parametrize("name", ["model.safetensors", "train.jsonl", "rows.parquet"])
def test_a_pointer_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(POINTER)
    assert is_lfs_pointer(file)
    with pytest.raises(
        UserError, match=rf"model.path = .*: {name} is a git-lfs pointer.*git lfs pull"
    ):
        check_no_lfs_pointer("model.path", str(tmp_path), file)
    with pytest.raises(UserError, match=r"data.train = .*: it is a git-lfs pointer"):
        check_no_lfs_pointer("data.train", str(file), file)


@pytest.mark.parametrize(
    "content", [b"", b"version", b'{"prompt": "version https://git-lfs"}\n', b"\x00\xff"]
)
def test_other_files_are_not_pointers(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content)
    assert not is_lfs_pointer(file)
    check_no_lfs_pointer("data.train", str(file), file)


def test_a_missing_file_is_not_a_pointer(tmp_path: Path) -> None:
    assert not is_lfs_pointer(tmp_path / "none")
    assert not is_lfs_pointer(tmp_path)
