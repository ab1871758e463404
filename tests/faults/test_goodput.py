"""A run with checkpoint.every=auto that is killed ends with the same weights, and counts what the
kill cost.
"""

import json
from pathlib import Path

from faults.conftest import FaultRow
from orchestrator.insight.summary import summary
from orchestrator.settings.load import load_spec
from orchestrator.training.manifest import committed, step_of
from orchestrator.training.result import last_result
from orchestrator.training.rundir import RunDir
from support.debug_runs import finish_debug, run_debug
from support.injector import Fault, plan, words
from support.tiny_settings import write_settings


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


def test_a_killed_run_with_automatic_checkpoints(tmp_path: Path, fault_row: FaultRow) -> None:
    settings = write_settings(tmp_path, training={"max_steps": 6, "logging_steps": 1})
    # an interval of 10 times a save: some of the steps are saved
    auto = ("checkpoint.every=auto", "checkpoint.every_steps=null", "cluster.mtbf_hours=1e-6")
    finish_debug(settings, "run.name=whole", *words("on_step_end"), ranks=2)
    env = plan(tmp_path, Fault("kill", "on_step_end", 5, 0))
    killed = run_debug(settings, "run.name=auto", *auto, *words("on_step_end"), ranks=2, env=env)
    assert killed.codes[0] == -9, killed.log
    assert "a checkpoint every" in killed.stdout
    run_dir = tmp_path / "runs" / "auto"
    saved = step_of(committed(run_dir / "checkpoints")[0])
    assert 1 <= saved < 5
    finish_debug(settings, "run.name=auto", *auto, *words("on_step_end"), ranks=2, env=env)
    assert weights(run_dir) == weights(tmp_path / "runs" / "whole")
    facts = json.loads((run_dir / "result.json").read_text())["goodput"]
    assert facts["repeated_steps"] == 5 - saved
    (restart,) = facts["restarts"]
    assert (restart["end"], restart["after_step"], restart["from_step"]) == ("died", 5, saved)
    assert 0 < facts["effective_s"] < facts["wall_s"]
    assert abs(facts["goodput"] - facts["effective_s"] / facts["wall_s"]) < 0.002
    result = last_result(RunDir(run_dir))
    assert result is not None
    printed = "\n".join(summary(load_spec(run_dir / "config.yaml"), result))
    assert f"restart  died after step 5, from {saved}, " in printed
    fault_row("goodput", "kill -9 with checkpoint.every=auto", "bitwise; lost steps are counted")
