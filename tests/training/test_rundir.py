"""The run directory: whose it is, what may change in it, and files that are never half written."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.durable import write_atomically
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec
from orchestrator.training.checkpoint_writer import save
from orchestrator.training.rundir import RunDir
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec


def begun(folder: Path, is_trained: bool = True) -> RunDir:
    """The directory of a run that began, with or without a checkpoint."""
    spec = tiny_spec(folder)
    run_dir = RunDir(spec.run_dir)
    run_dir.begin(spec)
    if is_trained:
        save(run_dir.checkpoints, 1, [], {}, ALONE)
    return run_dir


def test_beginning_writes_the_settings_and_forgets_how_it_ended_before(tmp_path: Path) -> None:
    run_dir = begun(tmp_path)
    assert run_dir.path == tmp_path / "runs" / "tiny"
    assert load_spec(run_dir.config) == tiny_spec(tmp_path)
    run_dir.write_result({"status": "stopped"})
    run_dir.begin(tiny_spec(tmp_path, training={"logging_steps": 3}))
    assert not run_dir.result.exists()
    assert load_spec(run_dir.config).training.logging_steps == 3


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        RunDir.existing(str(tmp_path))
    assert RunDir.existing(str(begun(tmp_path).path)).path == tmp_path / "runs" / "tiny"


def test_another_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run_dir = begun(tmp_path)
    with pytest.raises(UserError) as caught:
        run_dir.check(
            tiny_spec(tmp_path, dpo={"beta": 0.5}, optimizer={"lr": 5.0}, checkpoint={"keep": 9})
        )
    message = str(caught.value)
    assert message.startswith("run.name = 'tiny'")
    assert "dpo.beta (was 0.1, now 0.5)" in message
    assert "optimizer.lr (was 0.001, now 5.0)" in message
    assert "checkpoint" not in message


@pytest.mark.parametrize(
    ("is_trained", "change"),
    [
        (True, {}),
        (True, {"checkpoint": {"keep": 9}, "cluster": {"num_workers": 2}}),
        (False, {"dpo": {"beta": 0.5}}),
    ],
)
def test_settings_that_may_change_do_not_block_a_resume(
    tmp_path: Path, is_trained: bool, change: dict[str, Any]
) -> None:
    begun(tmp_path, is_trained).check(tiny_spec(tmp_path, **change))


def test_two_drivers_on_one_run_are_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    with run_dir.owned():
        rule = rf"is running already \(process {os.getpid()} on "
        with pytest.raises(UserError, match=rule), RunDir(tmp_path / "run").owned():
            pass
    with RunDir(tmp_path / "run").owned():  # free again
        pass


def test_a_stop_request_goes_to_the_process_that_owns_the_run(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    assert run_dir.owner() is None
    with run_dir.owned():
        run_dir.stop.touch()
        assert run_dir.owner() == f"process {os.getpid()} on {os.uname().nodename}"
    assert run_dir.owner() is None
    with run_dir.owned():
        # was asked of another; what is asked from now on, data being read, is kept
        assert not run_dir.stop.exists()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from orchestrator.training.rundir import "
        "RunDir\n"
        "with RunDir(Path(sys.argv[1])).owned(): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    with RunDir(tmp_path).owned():
        pass


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "newer")
    assert path.read_text() == "newer"
    assert os.listdir(tmp_path) == ["file"]
