"""The commands of docs/slurm.md on a real Slurm: Ray Train over two nodes, torchrun on one, and the
losses of debug.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from support.cluster_nodes import wait_until
from support.debug_runs import finish_debug
from support.repository import ROOT
from support.run_files import losses, metric_lines
from support.slurm_cluster import Slurm
from support.slurm_jobs import CANARY, Job, give, slurm_commands

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.timeout(1200)]
SHORT = {"epochs: 10": "epochs: 0.5", "logging_steps: 10": "logging_steps: 1"}  # 21 of 420 steps


def checkout(folder: Path, changes: dict[str, str]) -> Path:
    """A folder like a checkout, whose quickstart is changed; away from this one, where a run would
    leave its files.
    """
    (folder / "slurm").symlink_to(ROOT / "slurm")
    shutil.copytree(ROOT / "configs", folder / "configs")
    quickstart = folder / "configs" / "quickstart.yaml"
    text = quickstart.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    quickstart.write_text(text + "wandb: {mode: offline}\n")
    return folder


def start(slurm: Slurm, command: str, folder: Path, run: str) -> Job:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_API_KEY": CANARY,
    }
    env["RAY_TMPDIR"] = "/tmp/ray"  # which each node has for itself
    return give(slurm, command, folder, folder / "runs" / run, **env)


def finish(job: Job) -> None:
    """Wait until it is done; the key of W&B is in no log of Slurm or Ray either."""
    ended = job.ended(400)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.log()
    values = [path for path in job.slurm.folder.glob("*.log") if CANARY in path.read_text()]
    assert values == []
    for node in job.slurm.nodes.names:
        assert job.slurm.nodes.run(node, "grep", "-rlF", CANARY, "/tmp/ray").stdout == ""


def hosts(run_dir: Path) -> list[str]:
    """Return the host of each rank."""
    beats = (run_dir / "logs").glob("heartbeat_*.json")
    return sorted(json.loads(beat.read_text())["host"] for beat in beats)


def test_every_way_gives_the_losses_of_debug(slurm: Slurm, tmp_path: Path) -> None:
    submit, on_one_node = slurm_commands(0)
    folder = checkout(tmp_path, SHORT)

    over_two_nodes = start(slurm, submit, folder, "quickstart")
    finish(over_two_nodes)
    assert hosts(over_two_nodes.run_dir) == ["n1", "n2"]
    assert "finished after step 21" in over_two_nodes.log()

    torchrun = start(slurm, on_one_node, folder, "on-one-node")
    finish(torchrun)
    assert hosts(torchrun.run_dir) == ["n1", "n1"]

    finish_debug(folder / "configs/quickstart.yaml", "run.name=here", cwd=folder)
    here = losses(folder / "runs/here")
    assert sorted(here) == list(range(1, 22))
    assert losses(over_two_nodes.run_dir) == pytest.approx(here, abs=1e-5)
    assert losses(torchrun.run_dir) == pytest.approx(here, abs=1e-5)


@pytest.mark.slow
def test_a_requeue_in_the_middle_changes_no_bit(slurm: Slurm, tmp_path: Path) -> None:
    submit = slurm_commands(0)[0]
    weights: list[bytes] = []
    for name in ("undisturbed", "requeued"):
        (tmp_path / name).mkdir()
        job = start(slurm, submit, checkout(tmp_path / name, {}), "quickstart")
        if name == "requeued":
            wait_until(lambda job=job: "step 200/420" in job.log(), 400)
            job.signal("USR1")
            job.requeued()
        finish(job)
        assert job.slurm.job(job.number)["Restarts"] == str(int(name == "requeued"))
        last = metric_lines(job.run_dir)[-1]
        assert (last["step"], last["eval_rewards/accuracies"]) == (420, 1.0)
        weights.append((job.run_dir / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
