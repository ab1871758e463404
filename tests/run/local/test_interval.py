"""`verify --replay` takes the steps before a checkpoint again and compares every tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.cli import main
from orchestrator.durable import sha256_of
from orchestrator.run.local import interval
from orchestrator.training.manifest import MANIFEST, sealed
from support.command_line import orchestrator
from support.debug_runs import finish_debug
from support.tiny_settings import write_settings


def edit_weight(folder: Path, add: float) -> None:
    """Change the last weight of a checkpoint, and its manifest, so that it verifies."""
    path = folder / "rank_00000.safetensors"
    tensors = load_file(path)
    index = json.loads((folder / "index.json").read_text())
    of_rank = [(label, key) for file, label, _, key, *_ in index["ranges"] if file == path.name]
    label = next(label for label, key in reversed(of_rank) if key == "param")
    tensors[label][-1] += add
    save_file(tensors, path)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][path.name] = sha256_of(path)
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))


def test_an_interval_is_reproduced_and_a_changed_weight_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write_settings(tmp_path, checkpoint={"every_steps": 2, "keep": 2})
    finish_debug(settings)
    run_dir = tmp_path / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as files_are_equal:
        files_are_equal.setattr(interval, "_different_tensors", None)  # not called: hashes match
        assert main(["verify", str(run_dir), "--replay"]) == 0
    out = capsys.readouterr().out
    assert "steps 3 to 4, replayed on 1 rank: end with bitwise the state of step_00000004" in out
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before

    edit_weight(run_dir / "checkpoints" / "step_00000004", 0.5)
    assert main(["verify", str(run_dir), "--replay"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "steps 3 to 4, replayed on 1 rank: 1 difference from step_00000004" in lines
    assert "weight differs in 1 of " in lines[-1]
    assert "by at most 0.5" in lines[-1]


def test_the_first_checkpoint_is_replayed_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_debug(write_settings(tmp_path, training={"max_steps": 2}))
    assert main(["verify", str(tmp_path / "runs" / "tiny"), "--replay"]) == 0
    assert "steps 1 to 2, replayed on 1 rank: end with bitwise" in capsys.readouterr().out


def test_nothing_is_replayed_while_the_run_is_running(tmp_path: Path) -> None:
    finish_debug(write_settings(tmp_path, training={"max_steps": 1}))
    run_dir = interval.RunDir(tmp_path / "runs" / "tiny")
    with run_dir.owned():
        assert main(["verify", str(run_dir.path), "--replay"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed", "fsdp"])
def test_the_ranks_of_a_run_are_started_again(tmp_path: Path, engine: str) -> None:
    settings = write_settings(
        tmp_path,
        engine={"kind": engine},
        checkpoint={"every_steps": 2, "keep": 2},
        optimizer={"name": "torch.optim.AdamW"},
    )
    run = orchestrator("debug", settings, "--nproc", "2")
    assert run.returncode == 0, run.stderr
    run_dir = tmp_path / "runs" / "tiny"
    verified = orchestrator("verify", run_dir, "--replay")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    line = "steps 3 to 4, replayed on 2 ranks: end with bitwise the state of step_00000004"
    assert line in verified.stdout
    edit_weight(run_dir / "checkpoints" / "step_00000004", float(torch.tensor(0.25)))
    verified = orchestrator("verify", run_dir, "--replay")
    assert verified.returncode == 1
    assert "weight differs in 1 of " in verified.stdout
