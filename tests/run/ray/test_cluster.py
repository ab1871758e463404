"""Ray starts on this machine where the environment is hard on it, or one line says why it
cannot.
"""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from orchestrator.run.ray import cluster
from orchestrator.settings.errors import UserError
from support.tiny_settings import tiny_spec

LONG = "a-scratch-folder-of-a-user-with-a-rather-long-name/slurm-job-12345678/and-one-more-level"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo after the test whatever `entered` writes into the environment."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", cluster.TRAIN_V2):
        os.environ.pop(name, None)


@pytest.mark.parametrize("key", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_gets_a_short_link_where_socket_names_would_be_too_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    os.environ[key] = str(tmp_path / LONG)
    with cluster.ray_folder() as folder:
        assert Path(folder).resolve() == tmp_path / LONG / "ray"
        name = folder + cluster.LONGEST_SOCKET
        os.makedirs(os.path.dirname(name))
        with socket.socket(socket.AF_UNIX) as held:
            held.bind(name)
    assert not Path(folder).exists()
    assert (tmp_path / LONG / "ray").is_dir()  # with Ray's logs
    assert f"{key} is too long for its sockets" in capsys.readouterr().out


def test_a_temporary_folder_that_is_short_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["TMPDIR"] = "/tmp/x"
    with cluster.ray_folder() as folder:
        assert folder == "/tmp/x/ray"
    assert capsys.readouterr().out == ""


def test_the_limit_is_that_of_the_longest_socket() -> None:
    room = cluster.SOCKET_BYTES - len(cluster.LONGEST_SOCKET) - len("/ray")
    for length, is_link in ((room, False), (room + 1, True)):
        os.environ["TMPDIR"] = "/tmp/" + "x" * (length - 5)
        with cluster.ray_folder() as folder:
            assert os.path.islink(folder) is is_link
        if is_link:
            os.rmdir(os.environ["TMPDIR"] + "/ray")
            os.rmdir(os.environ["TMPDIR"])


def test_no_short_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["TMPDIR"] = str(tmp_path / LONG)
    monkeypatch.setattr(cluster, "SHORT_FOLDERS", ())
    with pytest.raises(
        UserError, match=r"TMPDIR = .* is too long.*; set RAY_TMPDIR to a shorter folder"
    ):
        cluster.ray_folder().__enter__()


def test_a_temporary_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.environ["RAY_TMPDIR"] = str(tmp_path / "file" / LONG)
    with pytest.raises(
        UserError,
        match=r"RAY_TMPDIR = .*cannot be written there \(Not a directory\); set RAY_TMPDIR",
    ):
        cluster.ray_folder().__enter__()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            ValueError("object store exceeds /dev/shm"),
            r"does not start on this machine \(object store exceeds /dev/shm\); see .*or",
        ),
        (
            RuntimeError("Failed to start GCS."),
            r"does not start on this machine .* train without Ray: orchestrator debug FILE",
        ),
        (
            Exception("The current node timed out " + 99 * "during startup "),
            r"startup \.\.\.\); see ",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"RAY_TMPDIR = .* \(No space left on device\); set RAY_TMPDIR",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"RAY_TMPDIR = .* that you can write to",
        ),
    ],
)
def test_whatever_ray_raises_at_its_start_is_one_line_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: raising(error))
    with pytest.raises(UserError, match=line) as caught, cluster.entered(tiny_spec(tmp_path)):
        raise AssertionError
    assert "\n" not in str(caught.value)


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("Malformed address"), RuntimeError("Version mismatch: 2.59 and 2.60")]
)
def test_whatever_ray_raises_where_it_joins_is_one_line_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    os.environ["RAY_ADDRESS"] = "nowhere"
    monkeypatch.setattr(ray, "init", lambda **_: raising(error))
    with (
        pytest.raises(
            UserError,
            match=rf"RAY_ADDRESS = 'nowhere': cannot be joined \({error}\); use the Python",
        ),
        cluster.entered(tiny_spec(tmp_path)),
    ):
        raise AssertionError


def test_a_ray_of_the_users_program_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with (
        pytest.raises(
            UserError, match=r"has already called ray\.init; call ray\.shutdown\(\) before training"
        ),
        cluster.entered(tiny_spec(tmp_path)),
    ):
        raise AssertionError


def test_train_v2_is_used_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "ray.train", raising=False)
    os.environ[cluster.TRAIN_V2] = "0"
    cluster.use_train_v2()
    assert os.environ[cluster.TRAIN_V2] == "1"
    assert "RAY_TRAIN_V2_ENABLED=0 is ignored" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["1", "0"])
def test_only_a_train_v1_that_the_users_program_has_imported_is_refused(version: str) -> None:
    program = (
        "import ray.train, orchestrator.run.ray.cluster as cluster\n"
        "try: cluster.use_train_v2()\n"
        "except cluster.UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, cluster.TRAIN_V2: version},
        capture_output=True,
        text=True,
        check=True,
    )
    refused = "RAY_TRAIN_V2_ENABLED = '0': ray.train was imported with this value, but runs need"
    assert done.stdout.startswith(refused) if version == "0" else done.stdout == ""
