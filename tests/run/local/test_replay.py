"""A step that was taken is taken again, in one process, with its loss and every pair of its
batch.
"""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from orchestrator.data.order import permutation
from orchestrator.engines import scale
from orchestrator.run.local.debug import debug
from orchestrator.run.local.replay import ReplayResult, replay
from orchestrator.settings.errors import UserError
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.manifest import committed
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug
from support.run_files import metric_lines
from support.tiny_settings import WORDS, random_rows, tiny_spec, write_settings

STEPS: dict[str, Any] = {
    "training": {"max_steps": 8, "logging_steps": 1},
    "checkpoint": {"every_steps": 3, "keep": 9},
    "evaluation": {"every_steps": 4},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of two ranks, with checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("replayed")
    finish_debug(write_settings(folder, **STEPS), ranks=2)
    return RunDir(folder / "runs" / "tiny")


def logged(run_dir: RunDir, step: int) -> dict[str, float]:
    return next(line for line in metric_lines(run_dir.path) if line["step"] == step)


def check(run_dir: RunDir, replayed: ReplayResult) -> None:
    """Against what the run has logged of that step."""
    line = logged(run_dir, replayed.step)
    assert replayed.loss == pytest.approx(line["loss"], abs=1e-6)
    assert replayed.grad_norm == pytest.approx(line["grad_norm"], rel=1e-4)
    assert fmean(pair.loss for pair in replayed.pairs) == pytest.approx(line["loss"], abs=1e-6)
    for side, name in enumerate(("chosen", "rejected")):
        assert fmean(pair.rewards[side] for pair in replayed.pairs) == pytest.approx(
            line[f"rewards/{name}"], abs=1e-5
        )
        assert fmean(pair.logps[side] for pair in replayed.pairs) == pytest.approx(
            line[f"logps/{name}"], abs=1e-3
        )
    assert replayed.logged == {"loss": line["loss"], "grad_norm": line["grad_norm"]}


def test_a_step_of_two_ranks_while_someone_owns_the_run(run_dir: RunDir) -> None:
    with run_dir.owned():
        before = {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*")}
        replayed = replay(run_dir, 7)
        assert {path: path.stat().st_mtime_ns for path in run_dir.path.rglob("*")} == before
    check(run_dir, replayed)
    assert replayed.checkpoint == run_dir.checkpoints / "step_00000006"
    assert [pair.loss for pair in replayed.pairs] == sorted(
        (pair.loss for pair in replayed.pairs), reverse=True
    )
    batch = permutation(32, 7, 1)[16:24]  # the third of the second epoch
    assert {pair.row for pair in replayed.pairs} == set(batch + 1)
    source = random_rows(32)
    for pair in replayed.pairs:
        row = source[pair.row - 1]
        assert (pair.prompt, pair.chosen.split("<|")[0]) == (row["prompt"], row["chosen"])
        assert pair.rejected.startswith(row["rejected"])


def test_steps_between_are_redone_and_all_is_printed(run_dir: RunDir) -> None:
    output = finish_debug(run_dir.path, "--replay-step", "5", "batch.micro_batch_size=4")
    assert "step 5 of tiny on cpu, after repeating 1 step from step_00000003" in output
    assert output.count("\nrow ") == 8
    assert output.count(", reference ") == 16
    assert any(word in output for word in WORDS)
    line = logged(run_dir, 5)
    numbers = {words[0]: words for words in map(str.split, output.splitlines()[-2:])}
    assert float(numbers["loss"][1].strip(",")) == pytest.approx(line["loss"], abs=1e-6)
    assert numbers["loss"][-1] == f"{line['loss']:.9f}"


def test_without_an_older_checkpoint_it_begins_at_the_start(
    run_dir: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = replay(run_dir, 2, [f"data.cache_dir={tmp_path}"])
    # nothing is added to what the run knows of its reference
    assert not list(tmp_path.rglob("*.logps"))
    check(run_dir, replayed)
    assert replayed.checkpoint is None
    assert (
        "after repeating 1 step from the start, as there is no older checkpoint"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("step", "overrides", "expected"),
    [
        (9, [], r"--replay-step = 9: the run in .* has reached at most step 8; use 1 to 8"),
        (
            7,
            ["optimizer.lr=0.5"],
            r"optimizer.lr = 0.5: is 0.001 in the run, so the step would differ; rem",
        ),
    ],
)
def test_steps_that_cannot_be_replayed_are_refused(
    run_dir: RunDir, step: int, overrides: list[str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        replay(run_dir, step, overrides)


@pytest.mark.parametrize(
    "blocks",
    [
        {"engine": {"kind": "fsdp"}, "reference": {"sync_every": 2, "cache": "off"}},
        {
            "engine": {"kind": "deepspeed", "zero_stage": 1},
            "model": {"lora": {"r": 4}},
            "reference": {"kind": "precomputed"},
        },
    ],
    ids=["fsdp, moving reference", "ZeRO-1, LoRA, precomputed"],
)
def test_a_step_of_other_engines_and_references(tmp_path: Path, blocks: dict[str, Any]) -> None:
    settings = write_settings(tmp_path, **{**STEPS, **blocks, "checkpoint": {"every_steps": 5}})
    finish_debug(settings, ranks=2)
    run_dir = RunDir(tmp_path / "runs" / "tiny")
    # after steps 6 and 7, between which the reference moves
    output = finish_debug(run_dir.path, "--replay-step", "8")
    line = logged(run_dir, 8)
    numbers = {words[0]: words for words in map(str.split, output.splitlines()[-2:])}
    assert float(numbers["loss"][1].strip(",")) == pytest.approx(line["loss"], abs=1e-6)


def test_replay_skips_the_steps_that_fp16_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "START", 2.0**40)
    monkeypatch.setattr(scale, "GROWTH_INTERVAL", 2)
    spec = tiny_spec(tmp_path, **STEPS, precision="fp16")
    debug(spec)
    run_dir = RunDir(spec.run_dir)
    # after 8, 6 and 3
    seen = [Reader(folder).meta["pairs_seen"] // 8 for folder in committed(run_dir.checkpoints)]
    assert seen[0] - 8 > seen[1] - 6 > seen[2] - 3 > 0  # some were skipped in each part
    for step in (2, 8):
        check(run_dir, replay(run_dir, step))
