"""What a run evaluates, and when: several sets by name, by steps, by epochs and at the start."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import forked
import pytest
from support import metric_lines, rows, write_jsonl, write_settings

from orchestrator.dpo.step import METRICS
from orchestrator.settings.spec import EVALUATED

CALLBACKS = """
import json
from pathlib import Path
from transformers import TrainerCallback

class NotesEvaluations(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        with open(Path(args.output_dir, "evaluations.jsonl"), "a") as file:
            line = {"step": state.global_step, "epoch": state.epoch, "best": state.best_metric, "metrics": metrics}
            file.write(json.dumps(line) + "\\n")
"""


class Run(NamedTuple):
    """A run that has ended."""

    dir: Path
    said: str

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """What each call of on_evaluate was given."""
        return [json.loads(line) for line in (self.dir / "evaluations.jsonl").read_text().splitlines()]


def run(folder: Path, *words: str, ranks: int = 1, **blocks: Any) -> Run:
    (folder / "my_callbacks.py").write_text(CALLBACKS)
    settings = write_settings(folder, **{"callbacks": ["my_callbacks:NotesEvaluations"], **blocks})
    return Run(folder / "runs" / "tiny", forked.finished(settings, *words, ranks=ranks, cwd=folder))


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two sets of which one holds the other's rows too, at the end of each of two epochs of 4 steps, on 2 ranks."""
    folder = tmp_path_factory.mktemp("sets")
    easy, all_rows = rows(3, seed=5), rows(3, seed=5) + rows(4, seed=6)
    sets = {
        name: str(write_jsonl(folder / f"{name}.jsonl", made)) for name, made in (("easy", easy), ("all", all_rows))
    }
    return run(
        folder,
        ranks=2,
        data={"eval": sets},
        training={"max_steps": None, "epochs": 2},
        evaluation={"every_epoch": True, "at_start": False, "metric_for_best": "all_loss"},
        reference={"cache": "full"},
        checkpoint={"every_steps": 4},
    )


def test_each_set_has_its_metrics_at_the_end_of_each_epoch(two_sets: Run) -> None:
    lines = {line["step"]: line for line in metric_lines(two_sets.dir) if "eval_easy_loss" in line}
    assert list(lines) == [4, 8]
    wanted = {f"eval_{name}_{metric}" for name in ("easy", "all") for metric in EVALUATED}
    for line in lines.values():
        assert {name for name in line if name.startswith("eval_")} == wanted
    assert lines[8]["eval_easy_loss"] != lines[8]["eval_all_loss"]


def test_callbacks_hear_of_each_set_and_of_the_best_so_far(two_sets: Run) -> None:
    heard, lines = two_sets.evaluated, {line["step"]: line for line in metric_lines(two_sets.dir)}
    assert [(call["step"], call["epoch"]) for call in heard] == [(4, 1.0), (4, 1.0), (8, 2.0), (8, 2.0)]
    for call, name in zip(heard, ["easy", "all"] * 2, strict=True):
        assert set(call["metrics"]) == {f"eval_{name}_{metric}" for metric in EVALUATED}
    assert [call["best"] for call in heard] == [None, None, *[lines[4]["eval_all_loss"]] * 2]


def test_what_is_said_names_the_set(two_sets: Run) -> None:
    for words in (
        "3 easy evaluation pairs, ",
        "7 all evaluation pairs, ",
        "reference cache: 3 easy evaluation pairs in ",
        "reference cache: 7 all evaluation pairs in ",  # whose answers are its own
        "evaluation of easy after step 4: loss ",
    ):
        assert words in two_sets.said


def test_a_checkpoint_at_the_end_of_an_epoch_knows_its_evaluation(two_sets: Run) -> None:
    meta = json.loads((two_sets.dir / "checkpoints" / "step_00000004" / "meta.json").read_text())
    assert meta["evaluated_at"] == 4
    assert meta["callbacks"]["best_global_step"] == 4


def test_the_settings_know_the_names_of_the_metrics() -> None:
    assert set(EVALUATED) == {*METRICS, "runtime", "samples_per_second"} - {"num_tokens"}
