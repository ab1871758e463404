"""Checks that `offline_wandb` reads back what the installed W&B client writes."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import wandb

from support.wandb_files import OfflineRun, read_run

STEPS = 50
CONFIG: dict[str, Any] = {
    "lr": 5e-7,
    "beta": 0.1,
    "name": "dpo é",
    "nested": {"betas": [0.9, 0.95], "none": None, "on": True},
    "large": "0123456789" * 10_000,  # a record over several 32 KiB blocks
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished offline run of `STEPS` steps."""
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_ERROR_REPORTING", "false")  # otherwise offline runs use the network
        patch.setenv("WANDB_CACHE_DIR", str(root / "cache"))
        run = wandb.init(
            mode="offline",
            dir=str(root),
            project="project",
            group="group",
            name="name",
            id="id1",
            config=CONFIG,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        for step in range(STEPS):
            run.log({"train/loss": 1 / (step + 1), "nested": {"a.b": step}}, step=step)
            run.log({"eval/loss": math.nan if step == 0 else step}, step=step)
        run.config["late"] = {"key": 1}
        run.summary["best"] = 0.5
        run.finish()
        wandb.teardown()
    [path] = root.glob("wandb/offline-run-*/run-id1.wandb")
    return path


@pytest.fixture(scope="module")
def run(run_file: Path) -> OfflineRun:
    return read_run(run_file)


def test_identity_and_config(run: OfflineRun) -> None:
    assert (run.run_id, run.project, run.group, run.name) == ("id1", "project", "group", "name")
    assert run.config == CONFIG | {"late": {"key": 1}}


def test_every_step_once_with_both_logs_of_a_step_merged(run: OfflineRun) -> None:
    assert [row["_step"] for row in run.history] == list(range(STEPS))
    for step, row in enumerate(run.history):
        assert row["train/loss"] == 1 / (step + 1)
        assert row["nested"] == {"a.b": step}
        assert row["eval/loss"] == step if step else math.isnan(row["eval/loss"])


def test_summary_holds_the_last_values(run: OfflineRun) -> None:
    assert run.summary["_step"] == STEPS - 1
    assert run.summary["eval/loss"] == STEPS - 1
    assert run.summary["best"] == 0.5


def test_a_cut_file_gives_the_whole_records_before_the_cut(
    run: OfflineRun, run_file: Path, tmp_path: Path
) -> None:
    content = run_file.read_bytes()
    assert len(content) > 3 * 32 * 1024
    cut_file = tmp_path / "cut.wandb"
    lengths: list[int] = []
    for size in range(7, len(content), 997):
        cut_file.write_bytes(content[:size])
        cut = read_run(cut_file)
        # Compared as text, where NaN equals itself.
        assert repr(cut.history) == repr(run.history[: len(cut.history)])
        assert cut.run_id in ("", "id1")
        lengths.append(len(cut.history))
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] > STEPS // 2


def test_a_damaged_or_foreign_file_is_an_error(run_file: Path, tmp_path: Path) -> None:
    content = bytearray(run_file.read_bytes())
    content[len(content) // 2] ^= 1
    bad = tmp_path / "bad.wandb"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        read_run(bad)
    bad.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a W&B"):
        read_run(bad)
