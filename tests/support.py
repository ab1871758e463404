"""What many tests need: small preference data, tiny settings, and the command line in a process of
its own.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from patience import patience

from orchestrator.settings.load import make_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.ledger import read
from orchestrator.training.rundir import RunDir

ROOT = Path(__file__).parent.parent
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


def doc_commands(page: str, heading: str) -> list[str]:
    """Return the blocks of commands below a heading of a page of docs/, as written there."""
    below = (ROOT / "docs" / page).read_text().partition(f"\n## {heading}\n")[2]
    chapter = re.split(r"\n##+ ", below)[0]
    return re.findall(r"```bash\n(.*?)```", chapter, re.DOTALL)


def rows(
    count: int, seed: int = 0, conversational: bool = False, longest: int = 12
) -> list[dict[str, Any]]:
    """Made-up pairs of random words; lengths vary from 1 to `longest` words."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    made: list[dict[str, Any]] = []
    for number in range(count):
        prompt, chosen, rejected = f"Say {text()}", f" good {text()} {number}", f" bad {text()}"
        if conversational:
            made.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            made.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return made


def write_jsonl(path: Path, made: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def raw_settings(folder: Path, **blocks: Any) -> dict[str, Any]:
    """Settings of a tiny run below `folder`, as nested dicts; keyword arguments are merged block by
    block.

    32 training and 8 evaluation pairs, fp32, W&B off, 8 pairs a step in micro-batches of 2.
    """
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    if not train.exists():
        write_jsonl(train, rows(32))
        write_jsonl(held_out, rows(8, seed=1))
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


def orchestrator(
    *words: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`orchestrator WORDS...` in a process of its own; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=patience(timeout),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        check=False,
    )


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, parsed."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """What is the same whenever a run is repeated."""
    return {
        name: value for name, value in line.items() if not name.endswith(("runtime", "_per_second"))
    }


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in metric_lines(run_dir) if "loss" in line}


def ledger_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The pair ledger up to the newest checkpoint: each pair of a step once, in the order of steps,
    and no other row in the folder.
    """
    made = read(RunDir(run_dir))[1].to_pylist()
    keys = [(row["step"], row["pair_id"]) for row in made]
    assert keys == sorted(set(keys))
    whole = pq.read_table(run_dir / "pairs.parquet").to_pylist()
    assert sorted(whole, key=lambda row: (row["step"], row["pair_id"])) == made
    return made
