"""Check that the files of a model folder are present, complete and downloaded before a library
reads them.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from orchestrator.data.files import check_no_lfs_pointer
from orchestrator.settings.errors import UserError

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WEIGHT_FILES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def check_files(key: str, folder: str, names: Iterable[str]) -> None:
    """Check that the named files of a folder are neither git-lfs pointers nor truncated.

    A hub name is not checked: the hub's client verifies its downloads.

    Raises:
        UserError: a file is a git-lfs pointer, truncated or corrupt.
    """
    for name in names:
        file = Path(folder, name)
        if file.exists() and not file.is_file():
            rule = f"its {name} is not a regular file"
            raise UserError(key, folder, rule, "use a folder with the files of a model")
        if file.is_file():
            check_no_lfs_pointer(key, folder, file)
            if file.suffix == ".safetensors":
                _check_length(key, folder, file)


def check_weight_files(key: str, folder: str) -> None:
    """Check that all weights of a folder are present.

    Raises:
        UserError: a shard is missing, truncated or a git-lfs pointer, or the index is not valid.
    """
    for name in WEIGHT_FILES:
        file = Path(folder, name)
        if not file.is_file():
            continue
        check_files(key, folder, [name])
        if name.endswith(".index.json"):
            check_files(key, folder, _shards(key, folder, file))
        return


def _shards(key: str, folder: str, index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        rule, fix = f"{index.name} is not a valid index of weights", "download it again"
        raise UserError(key, folder, rule, fix) from None
    missing = [name for name in shards if not Path(folder, name).is_file()]
    if missing:
        rule = (
            f"{len(missing)} of the {len(shards)} files in {index.name} are missing: "
            f"{', '.join(missing[:3])}"
        )
        raise UserError(key, folder, rule, "download or copy them")
    return shards


def _check_length(key: str, folder: str, file: Path) -> None:
    """Compare the length of a safetensors file with what its header describes."""
    length = os.path.getsize(file)
    with open(file, "rb") as opened:
        header_length = int.from_bytes(opened.read(8), "little")
        expected = 8 + header_length
        if expected <= length:
            try:
                header = json.loads(opened.read(header_length))
                expected += max(
                    (t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"),
                    default=0,
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    key, folder, f"{file.name} is not a safetensors file", "download it again"
                ) from None
    if length == 0:
        raise UserError(key, folder, f"{file.name} is empty", "download or copy it again")
    if length < expected:
        rule = (
            f"{file.name} is truncated or corrupt: it has {length} bytes, its header describes "
            f"{expected}"
        )
        raise UserError(key, folder, rule, "download or copy it again")
