"""A W&B server that does not answer costs the start a few seconds, and no metric."""

from pathlib import Path
from typing import get_args

import pytest

from faults.conftest import FaultRow
from support.debug_runs import finish_debug
from support.fake_wandb import Fault, broken_wandb
from support.run_files import losses
from support.tiny_settings import write_settings
from support.wandb_files import read_run

SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in get_args(Fault) if each != "500"]


@pytest.mark.parametrize("fault", ["500", *SLOW])
def test_a_wandb_that_does_not_work_is_replaced_by_an_offline_run(
    tmp_path: Path, fault: Fault, fault_row: FaultRow
) -> None:
    settings = write_settings(tmp_path, wandb={"mode": "online"}, training={"max_steps": 2})
    with broken_wandb(fault) as address:
        env = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40}
        printed = finish_debug(settings, env=env)
    run_dir = tmp_path / "runs" / "tiny"
    (warning,) = (line for line in printed.splitlines() if "W&B cannot be reached (" in line)
    assert warning.endswith(f"to upload them later: wandb sync {run_dir}/wandb/offline-run-*")
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    steps = [row for row in read_run(file).history if "train/loss" in row]
    assert [row["train/loss"] for row in steps] == list(losses(run_dir).values())
    fault_row("W&B does not answer", f"every request {fault}", "one line; recorded offline")
