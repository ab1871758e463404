"""Jobs that are handed to a cluster; real clusters are in tests/launch and tests/slurm."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from orchestrator.run.ray import stage, submit
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from support.tiny_settings import tiny_spec


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's working directory, with what a job needs and what it does not."""
    folder = tmp_path / "project"
    for name in (
        *["my_package/callbacks.py", "configs/my.yaml", "notes.txt"],  # needed, or harmless
        *[
            ".env",
            ".env.local",
            ".netrc",
            ".git/config",
            ".venv/bin/python",
            "my_package/__pycache__/callbacks.pyc",
        ],
        *[
            "train.jsonl",
            "runs/tiny/metrics.jsonl",
            "models/start/model.safetensors",
            "big/weights.bin",
            "scratch.tmp",
        ],
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
    stage.stage(spec_in(project), project, target)
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def test_code_is_taken_along_and_data_models_outputs_and_secrets_are_not(project: Path) -> None:
    assert staged(project) == {
        *["my_package/callbacks.py", "configs/my.yaml", "notes.txt"],
        *["big/weights.bin", "scratch.tmp"],
    }


def test_files_ignored_by_git_are_not_packaged(project: Path) -> None:
    (project / ".git/config").unlink()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    (project / ".gitignore").write_text("big/\n*.tmp\n")
    (project / os.fsdecode(b"caf\xe9.tmp")).touch()
    # nor .gitignore itself: Ray would obey it, and leave out what is added here
    assert staged(project) == {"my_package/callbacks.py", "configs/my.yaml", "notes.txt"}


def test_a_git_that_does_not_answer_is_not_taken_for_one_that_ignores_nothing(
    project: Path,
) -> None:
    (project / ".git/config").unlink()
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    (project / ".git/config").write_text("[half")
    with pytest.raises(
        UserError, match=r"working directory = .*: git cannot list ignored files .*bad config"
    ):
        staged(project)


def test_files_left_out_of_the_package_are_not_added_through_links(project: Path) -> None:
    """By a link, or where the settings name another path to it."""
    (project / "config.txt").symlink_to(".env")
    (project / "rows.jsonl").symlink_to("train.jsonl")
    (project / "nowhere").symlink_to("nothing")
    other = project.parent / "other"
    other.symlink_to(project)
    target = project.parent / "staged"
    stage.stage(spec_in(other), project, target)
    names = {path.name for path in target.rglob("*")}
    assert "callbacks.py" in names
    assert names.isdisjoint(
        {"config.txt", "rows.jsonl", "nowhere", "train.jsonl", "runs", "models"}
    )


def test_a_run_in_the_working_directory_itself_stays(project: Path) -> None:
    (project / "tiny").mkdir()
    (project / "tiny/metrics.jsonl").touch()
    target = project.parent / "staged"
    stage.stage(tiny_spec(project.parent, run={"dir": str(project)}), project, target)
    assert (target / "notes.txt").exists()
    assert not (target / "tiny").exists()


def test_a_file_that_no_package_can_hold_is_named(project: Path) -> None:
    (project / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(UserError, match=r"working directory = .*udce9.*add it to \.gitignore"):
        staged(project)


def test_a_working_directory_too_large_for_ray_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "LIMIT_BYTES", 2**20)
    (project / "big/weights.bin").write_bytes(bytes(2**20))
    rule = (
        r"working directory = .*project': contains more than 1 MB .*, most of it in big; add "
        r"big to \.gitignore"
    )
    with pytest.raises(UserError, match=rule):
        staged(project)


def test_a_path_of_the_cluster_is_left_to_the_cluster(tmp_path: Path) -> None:
    assert submit.not_on_this_machine(tiny_spec(tmp_path)) is None
    # the folder is here, so the file should be
    assert (
        submit.not_on_this_machine(tiny_spec(tmp_path, data={"eval": f"{tmp_path}/none.jsonl"}))
        is None
    )
    elsewhere = tiny_spec(tmp_path, data={"eval": "/of/the/cluster/eval.jsonl"})
    assert submit.not_on_this_machine(elsewhere) == "data.eval = /of/the/cluster/eval.jsonl"


class JobServer:
    """A fake job server whose connection breaks in the middle of a log: a real one that does so
    cannot be had.

    connections: the log, as far as each gives it. statuses: answers to how the job stands, once the
    log is whole.
    """

    def __init__(
        self, *connections: list[str | Exception], statuses: tuple[bool | Exception, ...] = ()
    ) -> None:
        self.connections, self.statuses = iter(connections), iter(statuses)
        self.is_over = False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in next(self.connections):
            if isinstance(text, Exception):
                raise text
            if text == "hangs":
                await asyncio.sleep(3600)
            yield text
        self.is_over = True

    def get_job_status(self, job: str) -> Any:
        answer = next(self.statuses, self.is_over)
        if isinstance(answer, Exception):
            raise answer
        return type("Status", (), {"is_terminal": lambda _: answer})()


BROKEN = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def followed(capsys: pytest.CaptureFixture[str], server: Any) -> str:
    asyncio.run(submit.follow(server, "job"))
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)


def test_a_log_is_followed_over_a_lost_connection(capsys: pytest.CaptureFixture[str]) -> None:
    refused = aiohttp.ServerDisconnectedError()  # no OSError
    server = JobServer(
        ["step 1\n", "st", BROKEN], [BROKEN], [refused], ["step 1\nste", "p 2\n", "step 3\n"]
    )
    assert followed(capsys, server) == "step 1\nstep 2\nstep 3\n"


def test_a_job_server_that_is_away_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    away = requests.ConnectionError("connection refused")
    server = JobServer(["step 1\n", BROKEN], ["step 1\nstep 2\n"], statuses=(away,))
    assert followed(capsys, server) == "step 1\nstep 2\n"


def test_the_end_of_a_log_is_read_though_the_connection_was_lost_before_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = JobServer(["step 1\n", BROKEN], ["step 1\nerror: 2\n"], statuses=(True,))
    assert followed(capsys, server) == "step 1\nerror: 2\n"


def test_a_log_that_went_with_its_node_is_not_waited_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        followed(capsys, JobServer(["step 1\n", BROKEN], [BROKEN], statuses=(True,))) == "step 1\n"
    )


def test_a_silent_connection_is_reopened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SILENCE_S", 0.05)
    assert (
        followed(capsys, JobServer(["step 1\n", "hangs"], ["step 1\nstep 2\n"]))
        == "step 1\nstep 2\n"
    )


def test_a_job_server_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AWAY_S", 0.0)
    server: Any = JobServer([BROKEN], statuses=(requests.ConnectionError("connection refused"),))
    with pytest.raises(
        ConnectionError,
        match=r"not answered .*connection refused.* may continue: ray job logs --follow job",
    ):
        asyncio.run(submit.follow(server, "job"))
