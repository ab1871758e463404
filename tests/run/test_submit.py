"""What is handed to a cluster; real clusters are in tests/launch and tests/slurm."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_spec

from orchestrator.run import submit
from orchestrator.settings.spec import RunSpec, UserError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's working directory, with what a job needs and what it does not."""
    folder = tmp_path / "project"
    for name in (
        *["my_package/callbacks.py", "configs/my.yaml", "notes.txt"],  # needed, or harmless
        *[".env", ".env.local", ".netrc", ".git/config", ".venv/bin/python", "my_package/__pycache__/callbacks.pyc"],
        *["train.jsonl", "runs/tiny/metrics.jsonl", "models/start/model.safetensors", "big/weights.bin", "scratch.tmp"],
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "linked").symlink_to(tmp_path)
    return folder


def spec_in(project: Path) -> RunSpec:
    model = {"init": None, "path": str(project / "models/start")}
    data = {"train": str(project / "train.jsonl")}
    return tiny_spec(project.parent, run={"dir": str(project / "runs")}, model=model, data=data)


def staged(project: Path) -> set[str]:
    target = project.parent / "staged"
    submit.stage(spec_in(project), project, target)
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def test_code_is_taken_along_and_data_models_outputs_and_secrets_are_not(project: Path) -> None:
    assert staged(project) == {
        *["my_package/callbacks.py", "configs/my.yaml", "notes.txt"],
        *["big/weights.bin", "scratch.tmp"],
    }


def test_what_git_ignores_stays_as_well(project: Path) -> None:
    (project / ".git/config").unlink()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    (project / ".gitignore").write_text("big/\n*.tmp\n")
    assert staged(project) == {"my_package/callbacks.py", "configs/my.yaml", "notes.txt", ".gitignore"}


def test_a_working_directory_too_large_for_ray_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "LIMIT_BYTES", 2**20)
    (project / "big/weights.bin").write_bytes(bytes(2**20))
    rule = r"working directory = .*project': holds more than 1 MB .*, most of it in big; add big to \.gitignore"
    with pytest.raises(UserError, match=rule):
        staged(project)


def test_a_path_of_the_cluster_is_left_to_the_cluster(tmp_path: Path) -> None:
    assert submit.not_on_this_machine(tiny_spec(tmp_path)) is None
    # the folder is here, so the file should be
    assert submit.not_on_this_machine(tiny_spec(tmp_path, data={"eval": f"{tmp_path}/none.jsonl"})) is None
    elsewhere = tiny_spec(tmp_path, data={"eval": "/of/the/cluster/eval.jsonl"})
    assert submit.not_on_this_machine(elsewhere) == "data.eval = /of/the/cluster/eval.jsonl"


class JobServer:
    """A fake job server whose connection breaks in the middle of a log: a real one that does so cannot be had."""

    def __init__(self, *connections: list[str]) -> None:
        self.connections = iter(connections)
        self.is_over = False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in next(self.connections):
            if text == "breaks":
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield text
        self.is_over = True

    def get_job_status(self, job: str) -> Any:
        return type("Status", (), {"is_terminal": lambda _: self.is_over})()


def test_a_log_is_followed_over_a_lost_connection(capsys: pytest.CaptureFixture[str]) -> None:
    server: Any = JobServer(["step 1\n", "st", "breaks"], ["breaks"], ["step 1\nste", "p 2\n", "step 3\n"])
    asyncio.run(submit._follow(server, "job"))
    assert capsys.readouterr().out == "step 1\nstep 2\nstep 3\n"
