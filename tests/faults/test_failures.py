"""What cannot be survived ends in one line and an exit code, never in a hang or a silent wrong result."""

import json
from pathlib import Path

from support import losses, orchestrator, rows, write_jsonl, write_settings


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, optimizer={"lr": 1e30}, scheduler={"name": "constant"})
    ended = orchestrator("debug", settings, "--nproc", "2", timeout=60)
    assert ended.returncode == 1
    assert "the gradient is not finite" in ended.stderr
    assert "step 2 (rank 0)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_fp16_skips_the_overflow_and_goes_on(tmp_path: Path) -> None:
    """The first loss scale of 65536 may or may not overflow; whatever it does, lr follows the steps that were taken."""
    settings = write_settings(tmp_path, precision="fp16", scheduler={"name": "linear", "warmup_steps": 2})
    ended = orchestrator("debug", settings)
    assert ended.returncode == 0, ended.stderr
    assert sorted(losses(tmp_path / "runs" / "tiny")) == [1, 2, 3, 4]


def test_bf16_runs_and_begins_at_ln_2(tmp_path: Path) -> None:
    ended = orchestrator("debug", write_settings(tmp_path, precision="bf16"))
    assert ended.returncode == 0, ended.stderr
    assert abs(losses(tmp_path / "runs" / "tiny")[1] - 0.6931471805599453) < 1e-6


def test_a_corrupt_checkpoint_is_passed_over(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, training={"max_steps": 8, "logging_steps": 1}, checkpoint={"every_steps": 2})
    whole = orchestrator("debug", settings, "run.name=whole")
    assert whole.returncode == 0, whole.stderr
    run_dir = tmp_path / "runs" / "whole"
    expected = losses(run_dir)
    (run_dir / "result.json").unlink()  # as if the run had died before its end
    shard = run_dir / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    again = orchestrator("debug", settings, "run.name=whole")
    assert again.returncode == 0, again.stderr
    assert "an older checkpoint is used" in again.stderr
    assert "resumed after step 6" in again.stdout
    assert losses(run_dir) == expected
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"


def test_other_rows_under_the_same_name_are_refused(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    assert orchestrator("debug", settings).returncode == 0
    (tmp_path / "runs" / "tiny" / "result.json").unlink()
    write_jsonl(tmp_path / "train.jsonl", [*rows(31), rows(1, seed=5)[0]])
    again = orchestrator("debug", settings)
    assert again.returncode == 2
    assert "not those that this run was started with" in again.stderr
