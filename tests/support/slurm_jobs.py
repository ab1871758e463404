"""Jobs of the scripts in slurm/ with stubs of ray and of orchestrator, which they find first on
PATH.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.cluster_nodes import wait_until
from support.repository import ROOT, doc_commands
from support.slurm_cluster import Slurm

STUBS = Path(__file__).parents[1] / "slurm" / "stub"
CANARY = "canary0123456789"  # a W&B key in the submitting environment


@dataclass
class Job:
    """A job of Slurm, the run directory of its run, and where its batch script prints."""

    slurm: Slurm
    number: int
    run_dir: Path
    log_file: Path

    def drivers(self) -> list[dict[str, Any]]:
        """Return the line of each stub of a driver so far."""
        output = self.run_dir / "drivers.jsonl"
        return (
            [json.loads(line) for line in output.read_text().splitlines()]
            if output.exists()
            else []
        )

    def started(self, count: int = 1) -> dict[str, Any]:
        """Wait until that many stubs of a driver have started; the last of them."""
        wait_until(lambda: len(self.drivers()) >= count, 60)
        return self.drivers()[-1]

    def go(self, code: int = 0) -> None:
        """Let the stub of a driver end."""
        (self.run_dir / "go").write_text(str(code))

    def signal(self, name: str) -> None:
        """As Slurm does it before the time is up: to the batch script alone."""
        done = self.slurm.run("scancel", "--batch", f"--signal={name}", str(self.number))
        assert done.returncode == 0, done.stderr

    def cancel(self) -> None:
        """As its user does it."""
        done = self.slurm.run("scancel", str(self.number))
        assert done.returncode == 0, done.stderr

    def state(self) -> str:
        """JobState of scontrol."""
        return self.slurm.job(self.number)["JobState"]

    def requeued(self) -> None:
        """Wait until it is in the queue once more."""
        wait_until(
            lambda: self.slurm.job(self.number)["Restarts"] != "0" and self.state() == "PENDING", 60
        )

    def ended(self, seconds: float = 120) -> dict[str, str]:
        """Wait for the end. Nothing is left of the job then, and no file of it has the key of
        W&B.
        """
        job = self.slurm.ended(self.number, seconds)
        for node in self.slurm.nodes.names:
            wait_until(lambda node=node: not self.slurm.processes(node), 30)
        for path in [self.log_file, *self.run_dir.rglob("*")]:
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
        return job

    def log(self) -> str:
        """Return the output of the batch script, over all starts."""
        return self.log_file.read_text() if self.log_file.exists() else ""


def slurm_commands(block: int) -> list[str]:
    """Return the commands of a block of code in docs/slurm.md."""
    return doc_commands("slurm.md", "Submitting a run")[block].splitlines()


def give(slurm: Slurm, command: str, folder: Path, run_dir: Path, **env: str) -> Job:
    """A command that submits, as it stands, on the login node; env is all of its environment."""
    done = slurm.run("bash", "-c", command, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    match = re.search(r"^(?:job +|Submitted batch job )(\d+)$", done.stdout, re.MULTILINE)
    assert match is not None, done.stdout
    number = int(match[1])
    return Job(slurm, number, run_dir, Path(slurm.job(number)["StdOut"]))


def with_stubs(**env: str) -> dict[str, str]:
    """An environment in which the stubs are found first."""
    around = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return around | {"PATH": f"{STUBS}:{os.environ['PATH']}", "WANDB_API_KEY": CANARY} | env


def submit_stubbed(
    slurm: Slurm,
    folder: Path,
    script: str,
    *flags: str,
    settings: dict[str, Any] | None = None,
    **env: str,
) -> Job:
    """Submit slurm/SCRIPT from `folder`, with settings.json there; env is added to the
    environment.
    """
    run_dir = folder / "run"
    if settings is None:
        settings = {"run_dir": str(run_dir)}
    (folder / "settings.json").write_text(json.dumps(settings))
    words = [*flags, "--time=10", ROOT / "slurm" / script, "settings.json", "a.b=c d"]
    number = slurm.sbatch(f"--output={folder}/%j.log", *words, env=with_stubs(**env), cwd=folder)
    return Job(slurm, number, run_dir, folder / f"{number}.log")
