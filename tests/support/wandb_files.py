"""Reads a W&B offline run file (`run-ID.wandb`) back into plain Python values."""

import importlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# The generated protobuf modules carry no type information, hence the dynamic import.
_Record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record

_FILE_HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK = 32 * 1024
_CHUNK_HEADER = struct.Struct("<IHB")  # crc32 of type and data, length, type
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class OfflineRun(NamedTuple):
    """Content of one run file.

    `config` leaves out W&B's own `_wandb` entry. `history` has one dict for each record
    in the file, in file order and not merged by step, with W&B's `_step`, `_timestamp`
    and `_runtime`. The strings are empty if the run was killed before W&B first wrote.
    """

    run_id: str
    project: str
    group: str
    name: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def read_run(path: Path) -> OfflineRun:
    """Reads a run file, up to the last whole record if the run was killed.

    Raises:
        ValueError: if the file is not a run file, or is damaged before its end.
    """
    run_id = project = group = name = ""
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for data in _records(path.read_bytes()):
        record: Any = _Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                run_id, project = run.run_id, run.project
                group, name = run.run_group, run.display_name
                _apply(config, run.config)
                _apply(summary, run.summary)
            case "config":
                _apply(config, record.config)
            case "summary":
                _apply(summary, record.summary)
            case "history":
                row: dict[str, Any] = {}
                _set_items(row, record.history.item)
                history.append(row)
            case _:
                pass
    config.pop("_wandb", None)
    return OfflineRun(run_id, project, group, name, config, history, summary)


def _records(content: bytes) -> Iterator[bytes]:
    """Yields each whole record of a leveldb log, joined from its chunks."""
    if not content.startswith(_FILE_HEADER):
        raise ValueError("not a W&B offline run file")
    position = len(_FILE_HEADER)
    parts: list[bytes] = []
    while True:
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _CHUNK_HEADER.size:  # too short for a chunk: zero padding
            position += left_in_block
        start = position + _CHUNK_HEADER.size
        if start > len(content):
            return
        checksum, length, kind = _CHUNK_HEADER.unpack_from(content, position)
        data = content[start : start + length]
        if len(data) < length:
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"wrong checksum at byte {position}")
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or bool(parts) != (kind in (_MIDDLE, _LAST)):
            raise ValueError(f"chunk of type {kind} out of place at byte {position}")
        parts.append(data)
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts.clear()
        position = start + length


def _apply(target: dict[str, Any], change: Any) -> None:
    """Applies the updates and removals of a config or summary record."""
    _set_items(target, change.update)
    for item in change.remove:
        *parents, last = item.nested_key or [item.key]
        inner = target
        for key in parents:
            inner = inner.get(key, {})
        inner.pop(last, None)


def _set_items(target: dict[str, Any], items: Iterable[Any]) -> None:
    """Sets each item's value at its key, or at its path of nested keys."""
    for item in items:
        *parents, last = item.nested_key or [item.key]
        inner = target
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
