"""Verbs parse, call one function and end with the exit code that says how it went."""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import __version__, cli
from orchestrator.run.local import debug as local
from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.training.checkpoint_writer import save
from orchestrator.training.manifest import FORMAT, sealed
from orchestrator.training.result import RunResult
from orchestrator.training.rundir import RunDir
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec, write_settings

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """main() puts the current folder on the path; one call of it in this process is to be as
    none.
    """
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run with two checkpoints."""
    spec = tiny_spec(tmp_path)
    directory = RunDir(spec.run_dir)
    directory.begin(spec)
    for step in (1, 2):
        save(directory.checkpoints, step, [], {}, ALONE)
    return directory


def ending_with(outcome: Any) -> Callable[..., RunResult]:
    def run(_: Any, **flags: Any) -> RunResult:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (
            RunResult("stopped", "received SIGINT", 3, "", None),
            3,
            "stopped after step 3 (received SIGINT)",
        ),
        (
            UserError("data.train", "x", "is wrong", "mend it"),
            2,
            "error: data.train = 'x': is wrong; mend it",
        ),
        (
            TrainingError("step 3: the gradient\nis not finite"),
            1,
            "error: step 3: the gradient is not finite",
        ),
        (KeyboardInterrupt(), 1, "aborted"),
    ],
)
def test_the_outcome_of_a_run_decides_the_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    outcome: Any,
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(local, "run_here", ending_with(outcome))
    assert cli.main(["debug", str(write_settings(tmp_path))]) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


def test_a_finished_run_prints_its_results(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    losses = {0: 0.7, 2: 0.6, 4: 0.25}
    lines = [
        {"step": step, "eval_loss": loss, "eval_rewards/accuracies": 0.5}
        for step, loss in losses.items()
    ]
    run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"loss": 1}]))
    result = RunResult("finished", "every step was taken", 4, "", "the/model", 4)
    monkeypatch.setattr(local, "run_here", ending_with(result))
    assert cli.main(["debug", str(write_settings(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "finished after step 4 (every step was taken)" in out
    assert "evaluation before  loss 0.700000" in out
    assert "evaluation after   loss 0.250000" in out
    assert "model    the/model\n" in out
    assert "W&B" not in out  # it is disabled
    monkeypatch.setattr(
        local, "run_here", ending_with(replace(result, model_step=2, best_step=2, best_metric=0.6))
    )
    assert (
        cli.main(["debug", str(write_settings(tmp_path, evaluation={"metric_for_best": "loss"}))])
        == 0
    )
    out = capsys.readouterr().out
    assert (
        f"best     eval_loss 0.600000 after step 2, {run_dir.checkpoints / 'step_00000002'}\n"
        in out
    )
    assert "model    the/model, of step 2\n" in out


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "run_here", ending_with(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["debug", str(write_settings(tmp_path))])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{file}", "optimizer.lr=0"], ["error: optimizer.lr = 0"]),
        (
            ["{file}", "optimizer.lr=0", "precision=x"],
            ["errors:", "optimizer.lr = 0", "precision = 'x'"],
        ),
        (["{file}", "optimizer.lrr=1"], ["did you mean optimizer.lr?"]),
        (["nowhere.yaml"], ["settings file = 'nowhere.yaml': does not exist"]),
        (["optimizer.lr=1"], ["a settings file is required"]),
        (["{file}", "data.train=nowhere.jsonl"], ["data.train", "does not exist"]),
    ],
)
def test_wrong_settings_end_with_2(
    tmp_path: Path, capsys: Output, words: list[str], expected: list[str]
) -> None:
    file = write_settings(tmp_path)
    assert cli.main(["plan", *(word.format(file=file) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in expected:
        assert text in captured.err


def test_without_words_the_whole_help_is_shown(capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "check every file of all checkpoints" in capsys.readouterr().err


def test_a_missing_argument_ends_with_2_and_one_line(capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == "error: the following arguments are required: RUN_DIR; see orchestrator verify --help"
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["help"], "check every file of all checkpoints"),
        (["help", "debug"], "--nproc N"),
        (["help", "settings"], "wandb.key_file"),
        (["help", "optimizer.lr"], "optimizer.lr (1e-06)  Peak learning rate."),
        (["--version"], f"orchestrator {__version__}"),
    ],
)
def test_help_is_shown_and_ends_with_0(capsys: Output, words: list[str], shown: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert shown in capsys.readouterr().out


def test_a_run_directory_is_planned_by_its_own_settings(
    run_dir: RunDir, tmp_path: Path, capsys: Output
) -> None:
    assert cli.main(["plan", str(run_dir.path), "batch.micro_batch_size=1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["run_dir"], facts["micro_batch_size"]) == (str(run_dir.path), 1)
    run_dir.path.rename(tmp_path / "moved")
    assert cli.main(["plan", str(tmp_path / "moved")]) == 2
    assert f"add run.dir={tmp_path} run.name=moved" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path / "moved"), f"run.dir={tmp_path}", "run.name=moved"]) == 0


@pytest.mark.parametrize("verb", ["stop", "verify", "pairs", "export"])
@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("run.yaml", "use {runs}/tiny, the directory of the run that it describes"),
        ("runs", "for example runs/tiny"),
        ("runs/tiny/checkpoints/step_00000001", "use the directory of the run, runs/tiny"),
        ("tiny", "did you mean runs/tiny?"),
        ("runs/tinny", "did you mean runs/tiny?"),
    ],
)
def test_a_wrong_run_directory_is_answered_with_the_nearest_one(
    run_dir: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
    verb: str,
    typed: str,
    fix: str,
) -> None:
    write_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, typed, *["out"] * (verb == "export")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: RUN_DIR = '{typed}': ")
    assert line.endswith(fix.format(runs=run_dir.path.parent))


def test_a_plan_as_lines_and_as_json(tmp_path: Path, capsys: Output) -> None:
    file = str(write_settings(tmp_path))
    assert cli.main(["plan", file]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert cli.main(["plan", "--json", file, "cluster.num_workers=2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (lines["grad_accum"], facts["grad_accum"]) == ("4", 2)
    assert facts.pop("notes") == []
    assert lines.keys() == facts.keys()


def test_a_plan_prints_a_note_for_each_odd_setting(tmp_path: Path, capsys: Output) -> None:
    file = str(write_settings(tmp_path))
    odd = ["optimizer.lr=5e7", "scheduler.warmup_steps=50"]
    assert cli.main(["plan", file, *odd]) == 0
    noted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert cli.main(["plan", file, *odd, "--json"]) == 0
    assert noted == [f"note: {line}" for line in json.loads(capsys.readouterr().out)["notes"]]
    assert [line.split(" = ")[0] for line in noted] == [
        "note: optimizer.lr",
        "note: scheduler.warmup_steps",
    ]


def test_a_plan_shows_rows(tmp_path: Path, capsys: Output) -> None:
    file = str(write_settings(tmp_path))
    assert cli.main(["plan", "--show-rows", "2", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[0] for line in lines if line.startswith("row ")] == [
        "row 1",
        "row 2",
    ]
    assert [line for line in lines if line.startswith("  chosen    ⟦ good")] != []
    assert [
        line for line in lines if "tokens of 32 rows" in line or "tokens of 8 rows" in line
    ] == [
        "data.train: tokens of 32 rows before truncation",
        "data.eval: tokens of 8 rows before truncation",
    ]
    assert cli.main(["plan", file, "--json", "--show-rows=3", "data.max_completion_length=1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in facts["rows"]] == [1, 2, 3]
    assert all(row["key"] == "data.train" for row in facts["rows"])
    assert {name: sets["rows"] for name, sets in facts["lengths"].items()} == {
        "data.train": 32,
        "data.eval": 8,
    }
    assert facts["train_rows"] == 32


def test_files_and_overrides_may_stand_in_any_order(tmp_path: Path, capsys: Output) -> None:
    first = write_settings(tmp_path)
    second = tmp_path / "second.yaml"
    second.write_text("batch: {global_batch_size: 16}\n")
    for words in (
        [first, "cluster.num_workers=2", second],
        [first, second, "cluster.num_workers=2"],
    ):
        assert cli.main(["plan", *map(str, words), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pairs_per_rank"] == 8


def test_verify_looks_at_every_checkpoint(run_dir: RunDir, capsys: Output) -> None:
    assert cli.main(["verify", str(run_dir.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step_00000002: complete", "step_00000001: complete"]
    (run_dir.checkpoints / "step_00000001" / "meta.json").write_text("{}")
    assert cli.main(["verify", str(run_dir.path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step_00000002: complete"
    assert "meta.json: its content is not what was written" in lines[1]
    newer = json.dumps(sealed({"format": 99}))
    (run_dir.checkpoints / "step_00000002" / "manifest.json").write_text(newer)
    assert cli.main(["verify", str(run_dir.path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"manifest.json format = 99: this version reads format {FORMAT}" in lines[0]
    assert "meta.json: its content is not what was written" in lines[1]


def test_verify_without_a_checkpoint_or_a_run(
    run_dir: RunDir, tmp_path: Path, capsys: Output
) -> None:
    for step in (1, 2):
        (run_dir.checkpoints / f"step_{step:08d}" / "manifest.json").unlink()
    assert cli.main(["verify", str(run_dir.path)]) == 1
    assert capsys.readouterr().out == "no checkpoint\n"
    assert cli.main(["verify", str(tmp_path)]) == 2


def test_export_of_a_folder_that_is_no_run_ends_with_2(tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "RUN_DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"), [(["--no-wait"], "--no-wait"), (["--address", "http://h:1"], "--address")]
)
def test_job_server_flags_are_refused_for_slurm(
    tmp_path: Path, capsys: Output, flags: list[str], named: str
) -> None:
    assert cli.main(["submit", "--to", "slurm", str(write_settings(tmp_path)), *flags]) == 2
    assert (
        f"error: --to = 'slurm': {named} applies only to a Ray cluster's job server; remove {named}"
        in capsys.readouterr().err
    )


def test_stop_signals_the_process_that_owns_the_run(tmp_path: Path, capsys: Output) -> None:
    run_dir = RunDir(tmp_path / "run")
    assert cli.main(["stop", str(run_dir.path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    with run_dir.owned():  # its data are still read: it has no config.yaml yet
        assert cli.main(["stop", str(run_dir.path)]) == 0
        assert run_dir.stop.exists()
        assert re.search(
            rf"signalled process {os.getpid()} on .*: it saves .* exits with code 3",
            capsys.readouterr().out,
        )
    run_dir.begin(tiny_spec(tmp_path))
    assert cli.main(["stop", str(run_dir.path)]) == 0
    assert capsys.readouterr().out == f"{run_dir.path} is not running\n"
