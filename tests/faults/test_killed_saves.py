"""A kill at any stage of a save, in the background or not, leaves a whole checkpoint from which the
same command ends with the weights of an undisturbed run; a save that fails there is heard of.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.training.manifest import committed, verify
from support.debug_runs import finish_debug, run_debug
from support.run_files import ledger_rows, losses
from support.run_hooks import dies_saving, disk_full_saving, slow_saves
from support.tiny_settings import write_settings

STEPS, EVERY = 5, 2  # checkpoints of steps 2, 4 and 5; the one of step 4 is killed
BACKGROUND = "checkpoint.async_save=true"
NOTED = "callbacks=['support.run_callbacks:NotesSaves']"

# (stage, rank that dies) of attempts that follow one another: each but the last leaves the
# checkpoint of step 2 alone
ALONE = [
    (stage, 0)
    for stage in (
        "begun",
        "half written",
        "written",
        "part begun",
        "part made",
        "complete",
        "renamed",
        "committed",
    )
]
KILLS = {
    (1, False): ALONE,
    (1, True): [("recorded", 0), *ALONE],
    (2, False): [
        *[
            ("begun", 0),
            ("half written", 1),
            ("written", 1),
            ("rows half written", 1),
            ("part made", 0),
        ],
        *[(stage, 0) for stage in ("complete", "renamed", "committed")],
    ],
    (2, True): [
        *[(stage, rank) for stage in ("begun", "half written", "written") for rank in (0, 1)],
        *[("rows half written", 0), ("rows half written", 1)],
        *[(stage, 0) for stage in ("recorded", "part made", "complete", "renamed", "committed")],
    ],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_settings(
        tmp_path_factory.mktemp("saves"),
        data={"eval": None},
        training={"max_steps": STEPS, "logging_steps": 1},
        checkpoint={"every_steps": EVERY},
        optimizer={"lr": 3e-3},
    )


@pytest.fixture(scope="module")
def undisturbed(settings: Path) -> Callable[[int], Path]:
    """The run directory of a run on so many ranks that is left alone, and saves before it
    goes on.
    """

    @cache
    def train(ranks: int) -> Path:
        finish_debug(settings, f"run.name=undisturbed{ranks}", NOTED, ranks=ranks)
        return folder_of(settings, f"undisturbed{ranks}")

    return train


def folder_of(settings: Path, name: str) -> Path:
    return settings.parent / "runs" / name


def steps_committed(run_dir: Path) -> list[int]:
    """Newest first; every one of them is whole."""
    folders = committed(run_dir / "checkpoints")
    assert [line for folder in folders for line in verify(folder)] == []
    return [int(folder.name.removeprefix("step_")) for folder in folders]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("ranks", "in_background"), KILLS)
def test_a_kill_at_any_stage_of_a_save_leaves_a_whole_checkpoint_that_is_used(
    settings: Path,
    undisturbed: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    in_background: bool,
) -> None:
    name = f"killed-{ranks}-{in_background}"
    words, run_dir = (
        [f"run.name={name}", f"checkpoint.async_save={in_background}"],
        folder_of(settings, name),
    )
    left: list[int] = []
    rows = ledger_rows(undisturbed(ranks))
    for stage, rank in KILLS[ranks, in_background]:
        dead = run_debug(
            settings, *words, ranks=ranks, hook=partial(dies_saving, stage, rank, 2 * EVERY)
        )
        # neither hangs nor aborts
        assert dead.codes == [-9 if each == rank else 1 for each in range(ranks)], dead.log
        assert f"resumed after step {EVERY}" in dead.log or not left
        left = [2 * EVERY, EVERY] if stage == "committed" else [EVERY]
        assert steps_committed(run_dir) == left, stage
        assert ledger_rows(run_dir) == [row for row in rows if row["step"] <= left[0]], stage

    assert f"resumed after step {2 * EVERY}" in finish_debug(settings, *words, ranks=ranks)
    assert cli.main(["verify", str(run_dir)]) == cli.DONE
    assert (
        capsys.readouterr().out
        == "step_00000005: complete\nstep_00000004: complete\npairs.parquet: complete\n"
    )
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]
    assert weights(run_dir) == weights(undisturbed(ranks))
    assert losses(run_dir) == losses(undisturbed(ranks))
    assert ledger_rows(run_dir) == rows


def noted_saves(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines that NotesSaves wrote."""
    return [json.loads(line) for line in (run_dir / "saves.jsonl").read_text().splitlines()]


def test_on_save_fires_after_each_commit(
    settings: Path, undisturbed: Callable[[int], Path]
) -> None:
    words = ["run.name=told", NOTED, BACKGROUND, "checkpoint.keep=9"]
    log = finish_debug(settings, *words, ranks=2, hook=partial(slow_saves, 0.1))
    run_dir, twin = folder_of(settings, "told"), undisturbed(2)
    lines = noted_saves(run_dir)
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0.5), (4, 1.0), (5, 1.25)]
    steps = [(line["step"], line["epoch"]) for line in noted_saves(twin)]
    assert steps == [
        (2, 0.5),
        (4, 1.0),
        (5, 1.25),
    ]
    assert all(line["in_main"] and not line["wrong"] for line in lines + noted_saves(twin))
    assert [line["begun"] for line in noted_saves(twin)] == [2, 4, 5]
    assert lines[0]["begun"] <= 3  # it was not kept until the next save
    assert [f"saved after step {step}" in log for step in (2, 4, 5)] == [True] * 3
    assert steps_committed(run_dir) == [5, 4, 2]
    assert weights(run_dir) == weights(twin)


def test_a_save_requested_by_the_last_evaluation_completes(settings: Path) -> None:
    words = ["run.name=asked", f"data.eval={settings.parent / 'eval.jsonl'}", NOTED, BACKGROUND]
    finish_debug(settings, *words, hook=partial(slow_saves, 0.1))
    assert [line["step"] for line in noted_saves(folder_of(settings, "asked"))] == [0, 2, 4, 5]


# found before the next save, or before the last
@pytest.mark.parametrize(("every", "rank"), [(2, 0), (2, 1), (3, 1)])
def test_a_save_that_fails_in_the_background_ends_the_run_on_all_ranks(
    settings: Path, every: int, rank: int
) -> None:
    name = f"full-{every}-{rank}"
    words = [f"run.name={name}", f"checkpoint.every_steps={every}", BACKGROUND]
    ended = run_debug(settings, *words, ranks=2, hook=partial(disk_full_saving, rank, every))
    assert ended.codes == [1, 1], ended.log
    reason = f"(rank {rank}: OSError: [Errno 28] No space left on device)"
    assert (
        ended.log.count(
            f"error: the checkpoint of step {every} could not be written {reason}; free space in"
        )
        == 2
    )
    run_dir = folder_of(settings, name)
    assert list((run_dir / "checkpoints").iterdir()) == []
    assert max(losses(run_dir)) == {2: 4, 3: STEPS}[every]  # training had gone on


def test_a_save_under_way_outlives_training_that_cannot_go_on(settings: Path) -> None:
    words = [
        "run.name=nan",
        "optimizer.lr=1e30",
        "scheduler.name=constant",
        "checkpoint.every_steps=1",
        BACKGROUND,
    ]
    ended = run_debug(settings, *words, hook=partial(slow_saves, 0.5))
    assert ended.codes == [1]
    assert "the gradient is not finite" in ended.log
    assert steps_committed(folder_of(settings, "nan")) == [1]
