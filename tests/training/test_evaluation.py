"""Evaluations of a run: which sets and when, the best step and its checkpoint, and an early end."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.settings.errors import UserError
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.export import export
from orchestrator.training.metrics import EVALUATED
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug, run_debug
from support.run_files import metric_lines
from support.tiny_settings import random_rows, write_jsonl, write_settings

CALLBACKS = """
import json, os, signal
from pathlib import Path
from transformers import TrainerCallback

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

def compute(eval_preds):
    predictions, labels = eval_preds
    margins = predictions.rewards[:, 0] - predictions.rewards[:, 1]
    return {"margin": margins.mean(), "pairs": len(labels)}

class NotesEvaluations(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        with open(Path(args.output_dir, "evaluations.jsonl"), "a") as file:
            line = {"step": state.global_step, "epoch": state.epoch, "metrics": metrics}
            line["best"] = state.best_metric
            line["best_checkpoint"] = state.best_model_checkpoint
            file.write(json.dumps(line) + "\\n")
"""


class Run(NamedTuple):
    """A run that has ended."""

    dir: Path
    output: str

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """Return the arguments of each call of on_evaluate."""
        return [
            json.loads(line) for line in (self.dir / "evaluations.jsonl").read_text().splitlines()
        ]


def run(folder: Path, *words: str, ranks: int = 1, **blocks: Any) -> Run:
    (folder / "my_callbacks.py").write_text(CALLBACKS)
    settings = write_settings(folder, **{"callbacks": ["my_callbacks:NotesEvaluations"], **blocks})
    return Run(folder / "runs" / "tiny", finish_debug(settings, *words, ranks=ranks, cwd=folder))


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two sets of which one holds the other's rows too, at the end of each of two epochs of 4
    steps, on 2 ranks.
    """
    folder = tmp_path_factory.mktemp("sets")
    easy, all_rows = random_rows(3, seed=5), random_rows(3, seed=5) + random_rows(4, seed=6)
    sets = {
        name: str(write_jsonl(folder / f"{name}.jsonl", rows))
        for name, rows in (("easy", easy), ("all", all_rows))
    }
    return run(
        folder,
        ranks=2,
        data={"eval": sets},
        training={"max_steps": None, "epochs": 2},
        evaluation={
            "every_epoch": True,
            "at_start": False,
            "compute_metrics": "my_callbacks:compute",
            "metric_for_best": "all_margin",
        },
        reference={"cache": "full"},
        checkpoint={"every_steps": 4},
    )


def test_each_set_has_its_metrics_at_the_end_of_each_epoch(two_sets: Run) -> None:
    lines = {line["step"]: line for line in metric_lines(two_sets.dir) if "eval_easy_loss" in line}
    assert list(lines) == [4, 8]
    values = {
        f"eval_{name}_{metric}"
        for name in ("easy", "all")
        for metric in (*EVALUATED, "margin", "pairs")
    }
    for line in lines.values():
        assert {name for name in line if name.startswith("eval_")} == values
    assert lines[8]["eval_easy_loss"] != lines[8]["eval_all_loss"]


def test_callbacks_hear_of_each_set_and_of_the_best_so_far(two_sets: Run) -> None:
    heard, lines = two_sets.evaluated, {line["step"]: line for line in metric_lines(two_sets.dir)}
    assert [(call["step"], call["epoch"]) for call in heard] == [
        (4, 1.0),
        (4, 1.0),
        (8, 2.0),
        (8, 2.0),
    ]
    for call, name in zip(heard, ["easy", "all"] * 2, strict=True):
        values = {f"eval_{name}_{metric}" for metric in (*EVALUATED, "margin", "pairs")}
        assert set(call["metrics"]) == {"epoch", *values}
    assert [call["best"] for call in heard] == [None, None, *[lines[4]["eval_all_margin"]] * 2]


def test_a_users_metrics_cover_the_whole_set_and_can_choose_the_best_step(two_sets: Run) -> None:
    lines = {line["step"]: line for line in metric_lines(two_sets.dir) if "eval_easy_loss" in line}
    for line in lines.values():
        assert (line["eval_easy_pairs"], line["eval_all_pairs"]) == (3, 7)
        for name in ("easy", "all"):
            assert line[f"eval_{name}_margin"] == pytest.approx(
                line[f"eval_{name}_rewards/margins"]
            )
    result = json.loads((two_sets.dir / "result.json").read_text())
    best = max(lines, key=lambda step: lines[step]["eval_all_margin"])
    assert (result["best_step"], result["best_metric"]) == (best, lines[best]["eval_all_margin"])


def test_output_of_an_evaluation_names_its_set(two_sets: Run) -> None:
    for words in (
        "3 easy evaluation pairs, ",
        "7 all evaluation pairs, ",
        "reference cache: 3 easy evaluation pairs in ",
        "reference cache: 7 all evaluation pairs in ",  # whose answers are its own
        "evaluation of easy after step 4: loss ",
    ):
        assert words in two_sets.output


def test_a_checkpoint_at_the_end_of_an_epoch_knows_its_evaluation(two_sets: Run) -> None:
    meta = json.loads((two_sets.dir / "checkpoints" / "step_00000004" / "meta.json").read_text())
    assert meta["evaluated_at"] == 4
    assert meta["callbacks"]["best_global_step"] == 4


# --- the best step, and an early end --------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The loss falls, and the largest is wanted: the first evaluation is the best, and the third
    after it is the end. It is killed after step 7, and goes on from the checkpoint of step 6.
    """
    folder = tmp_path_factory.mktemp("early")
    stopping = {"every_steps": 2, "metric_for_best": "loss", "greater_is_better": True}
    (folder / "my_callbacks.py").write_text(CALLBACKS)
    settings = write_settings(
        folder,
        training={"max_steps": 20},
        evaluation={**stopping, "early_stopping": {"patience": 3}},
        checkpoint={"every_steps": 3, "keep": 1, "export": "best"},
        callbacks=["my_callbacks:NotesEvaluations"],
    )
    killed = run_debug(settings, "callbacks=[my_callbacks:Dies]", ranks=2, cwd=folder)
    assert -9 in killed.codes, killed.log
    return Run(folder / "runs" / "tiny", finish_debug(settings, ranks=2, cwd=folder))


def test_early_stopping_finishes_the_run_and_its_count_survives_a_kill(stopped_early: Run) -> None:
    result = json.loads((stopped_early.dir / "result.json").read_text())
    lines = {
        line["step"]: line["eval_loss"]
        for line in metric_lines(stopped_early.dir)
        if "eval_loss" in line
    }
    assert list(lines) == [0, 2, 4, 6, 8]
    assert result["status"] == "finished"
    assert (result["step"], result["model_step"]) == (8, 2)
    assert (result["best_step"], result["best_metric"]) == (2, lines[2])


def test_the_best_checkpoint_stays_and_is_known_after_a_resume(stopped_early: Run) -> None:
    kept = sorted(path.name for path in (stopped_early.dir / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000008"]
    [heard] = stopped_early.evaluated
    assert heard["best_checkpoint"] == str(stopped_early.dir / "checkpoints" / "step_00000002")


def test_the_best_becomes_the_model(stopped_early: Run) -> None:
    model = load_file(stopped_early.dir / "model" / "model.safetensors")
    best, last = (Reader(stopped_early.dir / "checkpoints" / f"step_{step:08d}") for step in (2, 8))
    for name, value in model.items():
        assert torch.equal(value, best.parameter(name))
    assert any(not torch.equal(value, last.parameter(name)) for name, value in model.items())
    loss = next(line["eval_loss"] for line in metric_lines(stopped_early.dir) if line["step"] == 2)
    assert f"| eval_loss | {loss:.4f} |" in (stopped_early.dir / "model" / "README.md").read_text()


def test_where_no_evaluation_had_a_number_the_last_is_exported_and_a_line_says_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "my_metrics.py").write_text("def nothing(_): return {'odd': float('nan')}")
    evaluation = {"compute_metrics": "my_metrics:nothing", "metric_for_best": "odd"}
    settings = write_settings(
        tmp_path, training={"max_steps": 1}, evaluation=evaluation, checkpoint={"export": "best"}
    )
    ended = run_debug(settings, cwd=tmp_path)
    assert ended.codes == [0], ended.stderr
    assert (
        "no evaluation after a step had a number for eval_odd: the last is exported" in ended.stderr
    )
    assert (
        "receives log-probs, rewards and lengths of pairs; evaluation.logits=true" in ended.stdout
    )


def test_the_export_verb_takes_a_step_or_the_best(stopped_early: Run, tmp_path: Path) -> None:
    for which, step in ((None, 2), ("best", 2), ("last", 8)):
        out = export(RunDir(stopped_early.dir), tmp_path / f"{which}", which=which)
        assert f"| Optimizer steps | {step} |" in (out / "README.md").read_text()
    (stopped_early.dir / "checkpoints" / "step_00000002" / "index.json").unlink()
    with pytest.raises(UserError, match=r"its best checkpoint is not complete .*--checkpoint last"):
        export(RunDir(stopped_early.dir), tmp_path / "gone")
