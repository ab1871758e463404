"""Damage to any file of a run directory is restored, passed over or named: the same command ends
with the weights, the metrics and the model of an undisturbed run.
"""

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator import cli
from orchestrator.settings.load import load_spec
from orchestrator.training.rundir import RunDir
from support.debug_runs import Ended, run_debug
from support.run_files import ledger_rows, metric_lines, without_times
from support.run_hooks import at_step
from support.tiny_settings import write_settings

from .conftest import FaultRow  # pyright: ignore

STATES = {"killed": signal.SIGKILL, "stopped": signal.SIGTERM, "finished": None}


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)  # opening it fails, for root as well


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "unreadable": make_unreadable,
}


class Runs(NamedTuple):
    """One run in three states, of which one at a time is put in its place."""

    settings: Path
    run_dir: Path
    backups: Path

    def put(self, state: str) -> list[str]:
        """Put the run directory in a state; return the names of its files."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.copytree(self.backups / state, self.run_dir)
        files = (path for path in sorted(self.run_dir.rglob("*")) if path.is_file())
        return [str(path.relative_to(self.run_dir)) for path in files]

    def start(self) -> Ended:
        """Give the same command again."""
        return run_debug(self.settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("damaged")
    settings = write_settings(
        folder,
        training={"max_steps": 6, "logging_steps": 1},
        checkpoint={"every_steps": 2, "keep": 2},
        evaluation={"every_steps": 3},
    )
    runs = Runs(settings, folder / "runs" / "tiny", folder / "backups")
    for state, number in STATES.items():
        shutil.rmtree(runs.run_dir, ignore_errors=True)
        hook = None if number is None else partial(at_step, 5, number)
        codes = {"killed": [-signal.SIGKILL], "stopped": [cli.STOPPED], "finished": [cli.DONE]}
        ended = run_debug(settings, hook=hook)
        assert ended.codes == codes[state], ended.log
        shutil.copytree(runs.run_dir, runs.backups / state)
    return runs


def assert_undisturbed(runs: Runs, ended: Ended, with_ledger: bool = True) -> None:
    """Compare the run with the one that was never disturbed."""
    twin = runs.backups / "finished"
    assert ended.codes == [cli.DONE], ended.log
    assert "Traceback" not in ended.log
    for folder in ("model", "tokenizer"):
        names = {path.name for path in (twin / folder).iterdir()} - {"README.md"}
        assert {path.name for path in (runs.run_dir / folder).iterdir()} - {"README.md"} == names
        for name in names:
            expected = (twin / folder / name).read_bytes()
            assert (runs.run_dir / folder / name).read_bytes() == expected, name
    lines = list(map(without_times, metric_lines(runs.run_dir)))
    assert lines == list(map(without_times, metric_lines(twin)))
    assert load_spec(runs.run_dir / "config.yaml") == load_spec(runs.settings)
    if with_ledger:
        assert ledger_rows(runs.run_dir) == ledger_rows(twin)


def without_meaning(state: str, name: str, kind: str) -> bool:
    """Return whether `verify` cannot notice the damage: the content does not matter, can be edited
    by people, or a run that has not finished will write it again.
    """
    if name in (".owner", ".last_save", "model/README.md") or name.startswith("logs/"):
        return True
    if state != "finished" and name == "pairs.parquet/newest.parquet":
        return True
    older = name == "checkpoints/step_00000002/manifest.json"
    older |= state != "killed" and name == "checkpoints/step_00000004/manifest.json"
    is_absent_in_older_runs = name in ("result.json", "tokenizer/manifest.json")
    return kind == "deleted" and (older or (state != "finished" and is_absent_in_older_runs))


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_each_file_in_turn(
    runs: Runs, state: str, kind: str, fault_row: FaultRow, capsys: pytest.CaptureFixture[str]
) -> None:
    other_than_expected = list[str]()
    for name in runs.put(state):
        runs.put(state)
        began = time.monotonic()
        DAMAGE[kind](runs.run_dir / name)
        code = cli.main(["verify", str(runs.run_dir)])
        is_noticed = not without_meaning(state, name, kind)
        if code != (cli.FAILED if is_noticed else cli.DONE):
            other_than_expected.append(name)
        ended, outcome = runs.start(), "the same command ends as an undisturbed run"
        if ended.codes != [cli.DONE]:  # a checkpoint, or the lock
            assert kind == "unreadable"
            [line] = ended.stderr.splitlines()
            assert str(runs.run_dir / name) in line
            assert "cannot be read now" in line or (name == ".owner" and "remove it" in line)
            outcome = "refused with its name; once it is readable, ends as an undisturbed run"
            (runs.run_dir / name).unlink()
            shutil.copy(runs.backups / state / name, runs.run_dir / name)
            ended = runs.start()
        of_finished_checkpoint = state == "finished" and name.startswith("checkpoints/")
        assert_undisturbed(runs, ended, with_ledger=not of_finished_checkpoint)
        took = time.monotonic() - began
        fault_row(f"a {kind} file", f"{name} of a {state} run", outcome, took)
    assert other_than_expected == [], capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "kind"), [("killed", "flipped"), ("stopped", "deleted"), ("finished", "truncated")]
)
def test_damage_to_all_files_besides_checkpoints(
    runs: Runs, state: str, kind: str, fault_row: FaultRow
) -> None:
    for name in runs.put(state):
        if not name.startswith("checkpoints/"):
            DAMAGE[kind](runs.run_dir / name)
    assert cli.main(["verify", str(runs.run_dir)]) == cli.FAILED
    assert_undisturbed(runs, runs.start())
    fault_row(f"{kind} files", f"all but checkpoints of a {state} run", "as an undisturbed run")


def test_a_flipped_format_of_a_manifest_is_damage(runs: Runs, fault_row: FaultRow) -> None:
    runs.put("killed")
    path = runs.run_dir / "checkpoints" / "step_00000004" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 5'))
    ended = runs.start()
    line = f"{path}: is not a manifest, or is damaged; an older checkpoint is used"
    assert line in ended.stderr
    assert "resumed after step 2" in ended.stdout
    assert_undisturbed(runs, ended)
    fault_row("a flipped file", "format in a manifest", "the older checkpoint is used")


@pytest.mark.parametrize("state", ["killed", "stopped"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(
    runs: Runs, state: str, fault_row: FaultRow
) -> None:
    runs.put(state)
    shutil.rmtree(checkpoints := runs.run_dir / "checkpoints")
    logged = metric_lines(runs.run_dir)
    step = 4 if state == "killed" else 5
    for _ in range(2):
        ended = runs.start()
        assert ended.codes == [cli.WRONG]
        assert ended.stderr.splitlines() == [
            f"error: run.dir = '{runs.run_dir}': was saved up to step {step}, but {checkpoints} "
            "has no checkpoint; restore it, or choose another run.name, or remove "
            f"{runs.run_dir} to start over"
        ]
    assert metric_lines(runs.run_dir) == logged
    fault_row("deleted files", f"checkpoints/ of a {state} run", "refused in one line")


def test_a_finished_run_does_not_need_its_checkpoints(runs: Runs) -> None:
    runs.put("finished")
    shutil.rmtree(runs.run_dir / "checkpoints")
    ended = runs.start()
    assert ended.codes == [cli.DONE]
    assert "has finished already" in ended.stdout


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_config_neither_blames_the_user_nor_lets_settings_change(
    runs: Runs, kind: str, fault_row: FaultRow
) -> None:
    runs.put("stopped")
    DAMAGE[kind](runs.run_dir / "config.yaml")
    ended = run_debug(runs.settings, "dpo.beta=0.5")
    assert ended.codes == [cli.WRONG]
    assert "is a started run with other settings: dpo.beta (was 0.1, now 0.5)" in ended.stderr
    RunDir(runs.run_dir).check(load_spec(runs.settings))
    assert load_spec(RunDir(runs.run_dir).settings()) == load_spec(runs.settings)
    fault_row(f"a {kind} file", "config.yaml, with another beta", "refused in one line")


def test_export_restores_a_damaged_tokenizer(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    names = {Path(name).name for name in runs.put("finished") if name.startswith("tokenizer/")}
    folder, out = runs.run_dir / "tokenizer", runs.run_dir / "out"
    shutil.rmtree(folder)
    (runs.run_dir / "config.yaml").write_text("run:\n  name: ti")
    for name in ("", "manifest.json", "config.json"):
        if name:
            DAMAGE["truncated"](folder / name)
        assert cli.main(["export", str(runs.run_dir), str(out)]) == cli.DONE
        assert "written again from the settings that the run started with" in caplog.text
        caplog.clear()
        assert {path.name for path in folder.iterdir()} == names
        for path in (runs.backups / "finished" / "model").iterdir():
            assert path.name == "README.md" or (out / path.name).read_bytes() == path.read_bytes()
