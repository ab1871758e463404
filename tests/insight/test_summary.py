"""The last lines of a run: what it reached, what it answers, where everything is and what to do
next.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.insight.summary import summary
from orchestrator.run.local.debug import debug
from orchestrator.training.result import RunResult, finished_already, last_result
from orchestrator.training.rundir import RunDir
from support.tiny_settings import tiny_spec, write_settings

SAMPLE = {"prompt": "Say it.", "before": "\n\x00 the\nthe", "after": "word " * 99}


def lines_of(folder: Path, result: RunResult | None = None, **blocks: Any) -> list[str]:
    spec = tiny_spec(folder, **blocks)
    run_dir = RunDir(spec.run_dir)
    run_dir.path.mkdir(parents=True, exist_ok=True)
    return list(
        summary(
            spec, result or RunResult("finished", "every step was taken", 4, "", "the/model", 4)
        )
    )


def test_answers_are_shown_on_one_line_each(tmp_path: Path) -> None:
    result = RunResult(
        "finished", "every step was taken", 4, "", "the/model", 4, samples=[SAMPLE, SAMPLE]
    )
    shown = "\n".join(lines_of(tmp_path, result))
    assert shown.count("prompt   Say it.\nbefore   the the\nafter    word word ") == 2
    assert " word ...\n" in shown


def test_an_offline_run_says_how_to_upload_it(tmp_path: Path) -> None:
    folder = tiny_spec(tmp_path).run_dir / "wandb"
    for part in ("offline-run-1-ab", "offline-run-2-ab"):  # of a run that was resumed
        (folder / part).mkdir(parents=True)
    last = [
        line for line in lines_of(tmp_path, wandb={"mode": "offline"}) if line.startswith("W&B")
    ]
    assert last == [
        f"W&B      recorded offline; to upload it: wandb sync {folder}/offline-run-1-ab "
        f"{folder}/offline-run-2-ab"
    ]


@pytest.mark.parametrize(
    ("blocks", "word"),
    [({}, "your own model and pairs"), ({"training": {"pair_ledger": False}}, "")],
)
def test_the_summary_names_the_next_commands(
    tmp_path: Path, blocks: dict[str, Any], word: str
) -> None:
    shown = "\n".join(lines_of(tmp_path, **blocks))
    assert word in shown
    assert ("orchestrator pairs" in shown) is not bool(blocks)


def test_damaged_metrics_do_not_hide_the_rest_of_the_summary(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path)
    spec.run_dir.mkdir(parents=True)
    line = {"step": 0, "eval_loss": 0.5, "eval_rewards/accuracies": 0.25}
    half = json.dumps({**line, "step": 4})[:20].encode()
    (spec.run_dir / "metrics.jsonl").write_bytes(json.dumps(line).encode() + b"\n\xff\n" + half)
    assert "evaluation before  loss 0.500000, rewards/accuracies 0.250" in lines_of(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"status": "finished"}', '{"status": "died", "reason": ""}']
)
def test_a_damaged_result_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    assert last_result(RunDir(tmp_path)) is None


def test_a_finished_run_is_told_apart_without_torch_or_ray(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, training={"max_steps": 1})
    debug(spec)
    settings = write_settings(tmp_path, training={"max_steps": 1})
    script = tmp_path / "again.py"
    script.write_text(
        "import sys\nfrom orchestrator.cli import main\n"
        f"assert main(['train', {str(settings)!r}]) == 0\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("tiny has finished already, on 2")
    assert first.endswith("nothing to do; run.name=tiny-2 trains once more")
    assert "finished after step 1 (every step was taken)" in rest


@pytest.mark.parametrize("lost", ["model.safetensors", "result.json"])
def test_a_run_whose_model_was_lost_is_not_taken_for_finished(tmp_path: Path, lost: str) -> None:
    spec = tiny_spec(tmp_path, training={"max_steps": 1})
    run_dir = RunDir(spec.run_dir)
    debug(spec)
    assert finished_already(run_dir) is not None
    (run_dir.model / lost if lost != "result.json" else run_dir.result).unlink()
    assert finished_already(run_dir) is None
    assert debug(spec).status == "finished"  # and exports it again
    assert finished_already(run_dir) is not None


def test_paths_below_the_current_folder_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RunResult(
        "finished", "every step was taken", 4, "", str(tmp_path / "runs/tiny/model"), 4
    )
    shown = lines_of(tmp_path, result)
    assert "model    runs/tiny/model" in shown
    assert "metrics  runs/tiny/metrics.jsonl" in shown
