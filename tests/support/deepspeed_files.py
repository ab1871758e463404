"""Settings with a DeepSpeed configuration file, and the error that refuses one."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.tiny_settings import tiny_spec

SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"max_grad_norm": 1.0},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "kwargs": {"betas": [0.9, 0.95]}},
}


def with_file(folder: Path, file: Any, **blocks: Any) -> RunSpec:
    """Settings of a run under DeepSpeed with that file."""
    path = folder / "ds.json"
    path.write_text(json.dumps(file))
    engine = {"kind": "deepspeed", "deepspeed_config": str(path), **blocks.pop("engine", {})}
    merged = {
        name: {**SETTINGS.get(name, {}), **block}
        for name, block in blocks.items()
        if isinstance(block, dict)
    }
    return tiny_spec(folder, **{**SETTINGS, **blocks, **merged, "engine": engine})


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def refusal(folder: Path, file: Any, **blocks: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        with_file(folder, file, **blocks)
    return caught.value
