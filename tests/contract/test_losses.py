"""Whole runs with what the data and the user say of the loss: weights and margins of pairs, a loss
of one's own; and a mixture of experts without its load-balancing loss.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.dpo.step import METRICS
from support.debug_runs import finish_debug, run_debug
from support.run_files import losses, metric_lines
from support.tiny_settings import TINY_MODEL, random_rows, write_jsonl, write_settings

PAIRS = 6
SETTINGS: dict[str, Any] = {
    "data": {"weight_column": "w", "margin_column": "m"},
    "dpo": {"loss_type": ["sigmoid", "sft", "aot_unpaired"], "ld_alpha": 0.5},
    "training": {"max_steps": 3, "logging_steps": 1},
    "optimizer": {"lr": 3e-3},
}
# tokens are fed, whatever a pair weighs
SAME = tuple(name for name in METRICS if name != "num_tokens")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_curve_of_a_weight_of_two_is_that_of_the_row_twice(tmp_path: Path, ranks: int) -> None:
    weights = [2 if i in (1, 4) else 1 for i in range(PAIRS)]
    content = [
        {**row, "w": w, "m": 0.1 * i}
        for i, (row, w) in enumerate(zip(random_rows(PAIRS), weights, strict=True))
    ]
    repeated = [{**row, "w": 1} for row in content for _ in range(row["w"])]
    curves: list[list[dict[str, float]]] = []
    for name, rows in (("weighed", content), ("repeated", repeated)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        file = tmp_path / f"{name}.jsonl"
        words = (
            f"run.name={name}",
            f"data.train={file}",
            f"data.eval={file}",
            f"batch.global_batch_size={len(rows)}",
        )
        # with more, the tokenizer would depend on how often a row is there
        bytes_alone = "model.init.vocab_size=260"
        finish_debug(write_settings(tmp_path, **SETTINGS), *words, bytes_alone, ranks=ranks)
        curves.append(metric_lines(tmp_path / "runs" / name))
    for prefix, names, count in (("", (*SAME, "grad_norm"), 3), ("eval_", SAME, 2)):
        lines = [[line for line in curve if f"{prefix}loss" in line] for curve in curves]
        assert len(lines[0]) == count
        for weighed, twice in zip(*lines, strict=True):
            for key in (prefix + name for name in names):
                assert weighed[key] == pytest.approx(twice[key], rel=1e-4, abs=1e-5), key
        assert lines[0][-1][f"{prefix}loss"] < lines[0][0][f"{prefix}loss"]


MINE = """
from torch.nn.functional import logsigmoid

def dpo_again(terms, dpo):
    chosen = terms.chosen_logps - terms.ref_chosen_logps
    return -logsigmoid(dpo.beta * (chosen - terms.rejected_logps + terms.ref_rejected_logps))

def of_all(terms, dpo):
    return terms.chosen_logps.mean()
"""


def test_a_users_loss_trains_as_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text(MINE)
    settings = write_settings(
        tmp_path, data={"eval": None}, training={"max_steps": 3, "logging_steps": 1}
    )
    for name, loss in (("twin", "[sigmoid,sft]"), ("mine", "['my_losses:dpo_again',sft]")):
        finish_debug(settings, f"run.name={name}", f"dpo.loss_type={loss}", ranks=2, cwd=tmp_path)
    assert losses(tmp_path / "runs" / "mine") == losses(tmp_path / "runs" / "twin")
    refused = run_debug(settings, "run.name=wrong", "dpo.loss_type=my_losses:of_all", cwd=tmp_path)
    assert refused.codes == [cli.WRONG]
    assert "dpo.loss_type = 'my_losses:of_all': returns () for 3 synthetic pairs" in refused.stderr


def test_experts_train_without_their_load_balancing_loss(tmp_path: Path) -> None:
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    settings = write_settings(
        tmp_path,
        model={
            "init": {
                "model_type": "qwen3_moe",
                "vocab_size": 300,
                "config": {**TINY_MODEL, **sizes},
            }
        },
        data={"eval": None},
        optimizer={"lr": 3e-3},
    )
    refused = run_debug(settings)
    assert refused.codes == [cli.WRONG]
    assert "dpo.router_aux_loss_coef = (not set): the model's config sets 0.001" in refused.stderr
    finish_debug(settings, "dpo.router_aux_loss_coef=0", ranks=2)
    curve = losses(tmp_path / "runs" / "tiny")
    assert curve[1] == pytest.approx(math.log(2), abs=1e-5)
    assert curve[4] < curve[1]
    config = json.loads((tmp_path / "runs" / "tiny" / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
