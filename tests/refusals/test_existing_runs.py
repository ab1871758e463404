"""A run that exists already is protected: from other settings, other processes and exports."""

import fcntl
import shutil
from pathlib import Path

import pytest

from support.refusals import (
    Refusal,
    Run,
    UserInput,
    assert_refused,
    write_input,
)


@pytest.fixture
def trained(tmp_path: Path, run_here: Run) -> Path:
    """Train one step; return the run directory, runs/tiny in tmp_path."""
    write_input(tmp_path, UserInput(edits={"training.max_steps": 1}))
    code, _, stderr = run_here("debug", "run.yaml")
    assert code == 0, stderr
    return tmp_path / "runs" / "tiny"


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_is_refused_on_resume(
    finished: bool, trained: Path, run_here: Run
) -> None:
    if not finished:
        shutil.rmtree(trained / "model")
        (trained / "result.json").unlink()
    words = ("debug", "run.yaml", "optimizer.lr=1e-4", "dpo.beta=0.2", "training.logging_steps=5")
    code, _, stderr = run_here(*words)
    for changed in ("dpo.beta (was 0.1, now 0.2)", "optimizer.lr (was 0.001, now 0.0001)"):
        assert_refused(
            code,
            stderr,
            Refusal("run.name", "'tiny'", changed, "restore them to resume it, or choose"),
        )
    assert "logging_steps" not in stderr  # it may change


def test_a_run_that_another_process_owns_is_refused(tmp_path: Path, run_here: Run) -> None:
    write_input(tmp_path, UserInput())
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    with open(run_dir / ".owner", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write("process 1 on elsewhere")
        owner.flush()
        code, _, stderr = run_here("debug", "run.yaml")
    refusal = Refusal(
        "run.name",
        "'tiny'",
        "is running already (process 1 on elsewhere)",
        "wait for it, or choose",
    )
    assert_refused(code, stderr, refusal)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("verify", "nowhere"), "does not exist"),
        (("export", ".", "out"), "so it is not the directory of a run"),
    ],
    ids=["verify", "export"],
)
def test_a_folder_without_a_run_is_refused(
    words: tuple[str, ...], rule: str, tmp_path: Path, run_here: Run
) -> None:
    code, _, stderr = run_here(*words)
    assert_refused(
        code, stderr, Refusal("RUN_DIR", repr(words[1]), rule, "use the folder run.dir/run.name")
    )
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_checkpoint_is_refused(
    trained: Path, tmp_path: Path, run_here: Run
) -> None:
    shutil.rmtree(trained / "checkpoints")
    code, _, stderr = run_here("export", "runs/tiny", "out")
    assert_refused(
        code,
        stderr,
        Refusal("RUN_DIR", "'runs/tiny'", "has no complete checkpoint", "train it further first"),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "rule"),
    [("notes", "is a folder with other files"), ("run.yaml", "is a file")],
    ids=["folder", "file"],
)
def test_an_export_over_other_things_is_refused(
    out: str, rule: str, trained: Path, tmp_path: Path, run_here: Run
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    before = (tmp_path / "run.yaml").read_text()
    code, _, stderr = run_here("export", str(trained), out)
    assert_refused(code, stderr, Refusal("OUT", repr(out), rule, "choose a new folder"))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"
    assert (tmp_path / "run.yaml").read_text() == before
