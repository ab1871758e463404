"""slurm/debug.sbatch on a real Slurm: torchrun on one node, and the exit codes and signals that it
would lose.
"""

from pathlib import Path

import pytest

from support.cluster_nodes import wait_until
from support.slurm_cluster import Slurm
from support.slurm_jobs import Job, submit_stubbed

pytestmark = pytest.mark.slurm


def submit(slurm: Slurm, folder: Path, codes: list[int | None], *flags: str) -> Job:
    settings = {"run_dir": str(folder / "run"), "codes": codes}
    return submit_stubbed(slurm, folder, "debug.sbatch", *flags, settings=settings)


@pytest.mark.parametrize(("codes", "code"), [([0, 1], 1), ([1, 2], 2), ([3, 3], 3)])
def test_the_ranks_exit_code_is_the_jobs(
    slurm: Slurm, tmp_path: Path, codes: list[int | None], code: int
) -> None:
    job = submit(slurm, tmp_path, codes, "--gpus-per-node=2")  # a rank for each
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert sorted(path.name for path in job.run_dir.glob("rank-*")) == [
        "rank-0-of-2",
        "rank-1-of-2",
    ]


def test_usr1_saves_and_requeues(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, [None, None], "--ntasks-per-node=2")
    wait_until(lambda: len(list(job.run_dir.glob("rank-*"))) == 2, 60)
    job.signal("USR1")
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")


def test_scancel_is_final(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, [None], "--ntasks-per-node=1")
    wait_until(lambda: len(list(job.run_dir.glob("rank-*"))) == 1, 60)
    job.cancel()
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "exit code 3" in job.log()  # it was saved


def test_wrong_settings_are_refused(slurm: Slurm, tmp_path: Path) -> None:
    job = submit_stubbed(slurm, tmp_path, "debug.sbatch", settings={})
    assert job.ended()["ExitCode"] == "2:0"
    assert job.log() == "error: run.dir = (not set): the stub refuses\n"
