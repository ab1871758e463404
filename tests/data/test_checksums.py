"""A damaged file of the token cache is noticed at the next start, in one process of each node, and
the cache is built again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.data import checksums
from orchestrator.data.build_once import build_once
from orchestrator.data.pairs import Pairs
from support.timeouts import scaled_timeout
from support.tiny_parts import pairs_of
from support.tiny_settings import random_rows

ROWS = [{**row, "w": 2.0, "m": 1.0} for row in random_rows(6)]
FILES = (
    "tokens.npy",
    "lengths.npy",
    "hashes.npy",
    "swapped.npy",
    "rows.npy",
    "uncut.npy",
    "weights.npy",
    "margins.npy",
    "meta.json",
    "checksums.json",
)
OPENER = """
import logging, sys
from pathlib import Path
from orchestrator.data.build_once import build_once
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
build_once(Path(sys.argv[1]), lambda partial: (partial / "numbers").write_text("1 2 3"))
assert (Path(sys.argv[1]) / "numbers").read_text() == "1 2 3"
"""


def flip(path: Path) -> None:
    """Flip the low bit of a byte in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def opened(folder: Path) -> Pairs:
    return pairs_of(folder, ROWS, weight_column="w", margin_column="m")


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_token_cache_is_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (of_set,) = opened(tmp_path).sets
    whole = content_of(of_set.folder)
    assert sorted(whole) == sorted(FILES)
    for name in FILES:
        DAMAGES[damage](of_set.folder / name)
        caplog.clear()
        pairs = opened(tmp_path)
        assert content_of(of_set.folder) == whole
        assert pairs[3]["weight"] == 2.0
        (line,) = caplog.messages
        assert str(of_set.folder) in line
        assert "built again" in line
        opened(tmp_path)
        assert caplog.messages == [line]
    assert os.listdir(of_set.folder.parent) == [of_set.folder.name]


def test_cache_of_an_earlier_release_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (of_set,) = opened(tmp_path).sets
    (of_set.folder / "checksums.json").unlink()
    opened(tmp_path)
    assert "checksums.json is missing; it is built again" in caplog.text


def test_several_processes_build_a_damaged_folder_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "folder"
    build_once(folder, lambda partial: (partial / "numbers").write_text("1 2 3"))
    flip(folder / "numbers")
    processes = [
        subprocess.Popen([sys.executable, "-c", OPENER, folder], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=scaled_timeout(60))[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert "".join(outputs).count("numbers differs from its checksum; it is built again") == 1


def test_one_process_of_a_node_reads_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = tmp_path / "folder", list[Path]()
    build_once(folder, lambda partial: (partial / "numbers").write_text("1 2 3"))
    complaint = checksums._complaint
    monkeypatch.setattr(checksums, "_complaint", lambda path: read.append(path) or complaint(path))
    monkeypatch.setattr(checksums.tempfile, "gettempdir", lambda: str(tmp_path))
    assert checksums.damage(folder) is None
    assert checksums.damage(folder) is None
    assert len(read) == 2  # it was changed a moment ago, and might be again
    now = time.time()
    monkeypatch.setattr(checksums.time, "time", lambda: now + 60)
    assert checksums.damage(folder) is None
    assert checksums.damage(folder) is None
    assert len(read) == 3
    monkeypatch.setattr(checksums.time, "time", lambda: now + 700)
    assert checksums.damage(folder) is None
    assert len(read) == 4
    flip(folder / "numbers")
    assert checksums.damage(folder) == "numbers differs from its checksum"


def test_a_read_only_cache_is_checked_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    build_once(folder, lambda partial: (partial / "numbers").write_text("1 2 3"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    build_once(folder, refuse)
