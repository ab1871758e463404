"""Small preference data, and the settings of a tiny run over them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.settings.run import RunSpec

WORDS = [
    "red",
    "blue",
    "green",
    "amber",
    "stone",
    "river",
    "cloud",
    "lamp",
    "chair",
    "garden",
    "window",
    "bread",
]
TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def random_rows(
    count: int, seed: int = 0, conversational: bool = False, longest: int = 12
) -> list[dict[str, Any]]:
    """Made-up pairs of random words; lengths vary from 1 to `longest` words."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    values: list[dict[str, Any]] = []
    for number in range(count):
        prompt, chosen, rejected = f"Say {text()}", f" good {text()} {number}", f" bad {text()}"
        if conversational:
            values.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            values.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return values


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def raw_settings(folder: Path, **blocks: Any) -> dict[str, Any]:
    """Settings of a tiny run below `folder`, as nested dicts; keyword arguments are merged block by
    block.

    32 training and 8 evaluation pairs, fp32, W&B off, 8 pairs a step in micro-batches of 2.
    """
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    if not train.exists():
        write_jsonl(train, random_rows(32))
        write_jsonl(held_out, random_rows(8, seed=1))
    raw: dict[str, Any] = {
        "run": {"dir": str(folder / "runs"), "name": "tiny", "seed": 7},
        "model": {"init": {"model_type": "qwen2", "vocab_size": 300, "config": dict(TINY_MODEL)}},
        "data": {"train": str(train), "eval": str(held_out), "max_length": 128},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": 4, "logging_steps": 1},
        "precision": "fp32",
        "wandb": {"mode": "disabled"},
    }
    for name, block in blocks.items():
        raw[name] = {**raw.get(name, {}), **block} if isinstance(block, dict) else block
    return raw


def tiny_spec(folder: Path, **blocks: Any) -> RunSpec:
    """`raw_settings`, validated."""
    return make_spec(raw_settings(folder, **blocks))


def refused(folder: Path, **blocks: Any) -> UserError:
    """The error that settings are refused with."""
    with pytest.raises(UserError) as caught:
        make_spec(raw_settings(folder, **blocks))
    return caught.value


def write_settings(folder: Path, name: str = "run.yaml", **blocks: Any) -> Path:
    """`raw_settings` as a YAML file (JSON is YAML)."""
    path = folder / name
    path.write_text(json.dumps(raw_settings(folder, **blocks)))
    return path
