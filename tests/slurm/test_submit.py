"""`orchestrator submit --to slurm`: which flags the settings become, what Slurm makes of them, and
what it refuses.
"""

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.run.slurm import slurm_flags
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec
from support.repository import ROOT
from support.slurm_cluster import Slurm
from support.tiny_settings import tiny_spec, write_settings

SIXTEEN = {"num_workers": 16, "resources": {"GPU": 1, "CPU": 7.5}}


def flags(folder: Path, cluster: dict[str, Any], **slurm: Any) -> dict[str, str]:
    words = slurm_flags(tiny_spec(folder, cluster=cluster, slurm=slurm))
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def test_flags_follow_from_the_settings(tmp_path: Path) -> None:
    sbatch_flags = flags(
        tmp_path,
        SIXTEEN,
        workers_per_node=8,
        time=90000,
        partition="p",
        account="a",
        qos="q",
        signal_s=60,
    )
    assert sbatch_flags == {
        "job-name": "tiny",
        "nodes": "2",
        "gpus-per-node": "8",
        "cpus-per-task": "60",
        "time": "25:00:00",
        "signal": "B:USR1@60",
        "partition": "p",
        "account": "a",
        "qos": "q",
        "output": f"{tmp_path}/runs/tiny/logs/slurm-%j.log",
    }


@pytest.mark.parametrize(
    ("cluster", "slurm", "nodes", "gpus"),
    [
        ({"num_workers": 9}, {"workers_per_node": 8}, "2", "8"),
        ({"num_workers": [2, 9]}, {"workers_per_node": 4}, "1-3", "4"),
        ({"num_workers": 2}, {"workers_per_node": 8}, "1", "2"),  # no more than there are
        ({"num_workers": 4, "placement": "STRICT_SPREAD"}, {}, "4", "1"),
        ({"num_workers": 4, "placement": "STRICT_PACK"}, {}, "1", "4"),
        ({"num_workers": 1}, {}, "1", "1"),
        ({"num_workers": 3, "resources": {"GPU": 0.5}}, {"workers_per_node": 3}, "1", "2"),
    ],
)
def test_nodes_and_gpus(
    tmp_path: Path, cluster: dict[str, Any], slurm: dict[str, Any], nodes: str, gpus: str
) -> None:
    sbatch_flags = flags(tmp_path, {"resources": {"GPU": 1}} | cluster, **slurm)
    assert (sbatch_flags["nodes"], sbatch_flags["gpus-per-node"]) == (nodes, gpus)
    assert "cpus-per-task" not in sbatch_flags


def test_further_flags_stand_last(tmp_path: Path) -> None:
    words = slurm_flags(
        tiny_spec(
            tmp_path, cluster={"resources": {"CPU": 1}}, slurm={"args": ["--mem=0", "--nodes=3"]}
        )
    )
    assert words[-2:] == ["--mem=0", "--nodes=3"]
    assert "--gpus-per-node" not in " ".join(words)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            SIXTEEN,
            "slurm.workers_per_node = (not set): is required for 16 workers with "
            "cluster.placement PACK",
        ),
        (
            {"num_workers": 1},
            "cluster.resources = {}: is required: Slurm allocates only requested resources",
        ),
    ],
)
def test_missing_slurm_settings_are_refused(
    tmp_path: Path, cluster: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        flags(tmp_path, cluster)
    assert str(refused.value).startswith(message)


def submit_here(
    settings: Path, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Submit in this process with this PATH; return the exit code and stderr."""
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which main() adds the current folder
    code = main(["submit", "--to", "slurm", str(settings)])
    return code, capsys.readouterr().err


def test_without_sbatch_on_path_a_submission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path, cluster={"resources": {"CPU": 1}})
    code, stderr = submit_here(settings, str(tmp_path), monkeypatch, capsys)
    assert code == 2
    assert stderr == (
        "error: --to = 'slurm': there is no sbatch on PATH; "
        "submit on a machine with Slurm's commands, such as a login node of the cluster\n"
    )


def test_a_controller_that_does_not_answer_is_an_error_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path, cluster={"resources": {"CPU": 1}})
    message = (
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller "
        "(connect failure)"
    )
    sbatch = tmp_path / "sbatch"  # a stub: the real one tries for nine seconds
    sbatch.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, stderr = submit_here(settings, path, monkeypatch, capsys)
    assert code == 1  # the settings are not to blame
    assert stderr == f"error: {message.replace('sbatch: error:', 'sbatch:')}\n"


def submit(slurm: Slurm, *words: str | Path) -> CompletedProcess[str]:
    return slurm.run(
        sys.executable, "-m", "orchestrator.cli", "submit", "--to", "slurm", *words, cwd=ROOT
    )


@pytest.mark.slurm
def test_sbatch_accepts_a_submission(slurm: Slurm, tmp_path: Path) -> None:
    settings = write_settings(
        tmp_path,
        cluster=SIXTEEN,
        slurm={"workers_per_node": 8, "time": "1-00:00", "args": ["--hold"]},
    )
    submitted = submit(slurm, settings, "optimizer.lr=2e-3")
    assert submitted.returncode == 0, submitted.stderr
    output = dict(line.split(maxsplit=1) for line in submitted.stdout.splitlines()[-4:])
    run_dir, number = tmp_path / "runs/tiny", output["job"]
    assert output["follow"] == f"tail -F {run_dir}/logs/slurm-{number}.log"
    assert output["stop"] == f"orchestrator stop {run_dir}"
    job = slurm.job(int(number))
    assert (job["JobName"], job["NumNodes"], job["TimeLimit"]) == ("tiny", "2-2", "1-00:00:00")
    assert (job["NumCPUs"], job["StdOut"]) == ("120", f"{run_dir}/logs/slurm-{number}.log")
    assert job["Requeue"] == "1"
    assert load_spec(run_dir / "submitted.yaml") == load_spec(settings, ["optimizer.lr=2e-3"])
    slurm.run("scancel", number)


@pytest.mark.slurm
def test_a_rejection_by_sbatch_is_one_line_with_a_fix(slurm: Slurm, tmp_path: Path) -> None:
    settings = write_settings(
        tmp_path, cluster=SIXTEEN, slurm={"workers_per_node": 8, "partition": "nowhere"}
    )
    refused = submit(slurm, settings)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: slurm = {'workers_per_node': 8, 'partition': 'nowhere'}: sbatch rejects the "
        "job: invalid partition specified: nowhere; Batch job submission failed: Invalid "
        "partition name specified; change this block, or cluster.resources\n"
    )
