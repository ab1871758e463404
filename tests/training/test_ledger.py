"""The pair ledger has what each step saw of each pair, once, whatever happens to checkpoints and
whoever reads it.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from orchestrator import cli
from orchestrator.dpo.step import StepOutput
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import save_spec
from orchestrator.settings.loss import DpoSpec
from orchestrator.training import checkpoint_writer, ledger
from orchestrator.training.checkpoint_writer import RankState, SaveFailed, Saver
from orchestrator.training.ledger import SCHEMA, TAIL, Ledger, read, verify
from orchestrator.training.manifest import listed_in, set_aside, step_folder
from orchestrator.training.rundir import NEWEST_PAIRS, RunDir
from orchestrator.training.seen_pairs import SeenPairs
from orchestrator.world import World
from support.debug_runs import finish_debug
from support.run_files import ledger_rows, metric_lines
from support.run_hooks import notes_pairs
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE, pair_batch
from support.tiny_settings import random_rows, tiny_spec, write_jsonl, write_settings

BETA = 0.5


# --- what a step saw ------------------------------------------------------------------------------


def output(pairs: int, offset: float) -> StepOutput:
    """Return a possible output of a step: numbers that are all different."""
    numbers = torch.arange(5.0 * pairs, dtype=torch.float64) + offset
    logps, ref_logps, losses = numbers.split([2 * pairs, 2 * pairs, pairs])
    return StepOutput(
        losses.sum(), torch.zeros(0), -logps.requires_grad_(), -(ref_logps**1.1), losses
    )


def test_ledger_rows_hold_the_pairs_of_a_step_without_fillers() -> None:
    seen = SeenPairs(DpoSpec(beta=BETA))
    batches = [pair_batch(3), pair_batch(2, seed=1), pair_batch(1, is_filler=True)]
    outputs = [output(len(batch.pair_ids), 100.0 * n) for n, batch in enumerate(batches)]
    seen.add(7, 1, list(zip(batches, outputs, strict=True)))
    seen.add(8, 1, [(batches[2], outputs[2])])  # a rank may have nothing but fillers
    seen.add(9, 2, [(batches[0], outputs[0])])
    actual = seen.take()
    assert actual.schema == SCHEMA
    expected = []
    for step, epoch, number in ((7, 1, 0), (7, 1, 1), (9, 2, 0)):
        batch, numbers = batches[number], outputs[number]
        for i, pair in enumerate(batch.pair_ids.tolist()):
            chosen, rejected, ref_chosen, ref_rejected = (
                half[i].item()
                for both in (numbers.logps, numbers.ref_logps)
                for half in both.chunk(2)
            )
            tokens = [half[i].item() for half in batch.completion_tokens.chunk(2)]
            margin = BETA * (chosen - ref_chosen) - BETA * (rejected - ref_rejected)
            of = (
                chosen,
                rejected,
                ref_chosen,
                ref_rejected,
                margin,
                numbers.losses[i].item(),
                *tokens,
            )
            expected.append((pair, step, epoch, *of))
    assert [tuple(row.values()) for row in actual.to_pylist()] == expected
    assert seen.take().num_rows == 0


# --- parts and tails ------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Return the directory of a run with settings, whose tails become parts at 8 rows."""
    monkeypatch.setattr(ledger, "PART_ROWS", 8)
    directory = RunDir(tmp_path / "run")
    directory.path.mkdir()
    save_spec(tiny_spec(tmp_path), directory.config)
    return directory


def seen(steps: range, ranks: int = 1, rank: int = 0, pairs: int = 4) -> pa.Table:
    """A rank's share of rows of so many pairs a step; their loss tells which is which."""
    mine = [(pair, step) for step in steps for pair in range(rank, pairs, ranks)]
    columns = {name: [0] * len(mine) for name in SCHEMA.names}
    columns |= {"pair_id": [pair for pair, _ in mine], "step": [step for _, step in mine]}
    columns["loss"] = [10.0 * step + pair for pair, step in mine]
    return pa.table(columns, schema=SCHEMA)


def goes_on(
    run_dir: RunDir, actual: int | None = None, world: World = ALONE, keep: int = 2
) -> Saver:
    """Return the saver of a run that begins, or resumes after step `newest_step`."""
    kept = Ledger(run_dir.pairs) if world.is_main else None
    if kept is not None:
        kept.go_on(None if actual is None else step_folder(run_dir.checkpoints, actual))
    return Saver(run_dir.checkpoints, world, keep, 60, kept)


def save(saves: Saver, after: int, step: int, in_background: bool = False) -> None:
    """A checkpoint of a step, with the rows since `after`."""
    mine = seen(range(after + 1, step + 1), saves.world.size, saves.world.rank)
    saves.save(step, [], {}, RankState(seen=mine), in_background)


def steps(run_dir: RunDir) -> list[int]:
    """Those in the ledger, each of which has its four rows once."""
    rows = ledger_rows(run_dir.path)
    assert [row["loss"] for row in rows] == [10.0 * row["step"] + row["pair_id"] for row in rows]
    assert [row["pair_id"] for row in rows] == [0, 1, 2, 3] * (len(rows) // 4)
    return [row["step"] for row in rows[::4]]


def parts(run_dir: RunDir) -> list[str]:
    return sorted(path.name[:22] for path in run_dir.pairs.iterdir())


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_stay_when_checkpoints_go(run_dir: RunDir, ranks: int, in_background: bool) -> None:
    def work(world: World) -> list[list[int]]:
        saves, values = goes_on(run_dir, world=world), []
        for step in range(1, 8):
            save(saves, step - 1, step, in_background)
            saves.wait()
            values.append(steps(run_dir) if world.is_main else [])
            world.gather(None)  # nobody saves while rank 0 looks
        return values

    assert on_ranks(ranks, work)[0] == [list(range(1, step + 1)) for step in range(1, 8)]
    assert parts(run_dir) == [
        NEWEST_PAIRS,
        *(f"steps_{first:08d}_{first + 1:08d}."[:22] for first in (1, 3, 5)),
    ]
    assert [path.name for path in sorted(run_dir.checkpoints.iterdir())] == [
        "step_00000006",
        "step_00000007",
    ]
    assert verify(run_dir) == []


def test_a_pair_that_a_step_saw_twice_is_one_row(run_dir: RunDir) -> None:
    """As one of a data set whose weight is above 1 may be, on any ranks."""

    def work(world: World) -> None:
        saves = goes_on(run_dir, world=world)
        saves.save(
            2,
            [],
            {},
            RankState(seen=pa.concat_tables([seen(range(1, 3)), seen(range(2, 3))])),
        )

    on_ranks(2, work)
    assert steps(run_dir) == [1, 2]


@pytest.mark.parametrize("actual", [4, 5, 6])
def test_resume_forgets_rows_after_its_checkpoint(run_dir: RunDir, actual: int) -> None:
    saves = goes_on(run_dir, keep=9)
    for step in range(1, 8):
        save(saves, step - 1, step)
    set_aside(run_dir.checkpoints, step_folder(run_dir.checkpoints, actual))
    (run_dir.pairs / ".steps_of_a_crash.partial").touch()

    again = goes_on(run_dir, actual)
    assert steps(run_dir) == list(range(1, actual + 1))
    assert not list(run_dir.pairs.glob(".*"))
    save(again, actual, 9)
    assert steps(run_dir) == list(range(1, 10))


def test_without_a_checkpoint_the_ledger_is_empty(run_dir: RunDir) -> None:
    save(goes_on(run_dir), 0, 3)
    for folder in run_dir.checkpoints.iterdir():
        folder.rename(run_dir.path / "away")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        read(run_dir)
    goes_on(run_dir)
    assert list(run_dir.pairs.iterdir()) == []


def test_rows_outlive_a_ledger_that_is_switched_off(run_dir: RunDir) -> None:
    first = goes_on(run_dir)
    save(first, 0, 2)
    save(first, 2, 3)
    for step in (5, 6):
        goes_on(run_dir, step - 2 if step == 5 else 5).save(step, [], {})
        assert steps(run_dir) == [1, 2, 3]


def test_a_run_that_never_kept_one_has_no_folder(run_dir: RunDir) -> None:
    goes_on(run_dir).save(1, [], {})
    assert not run_dir.pairs.exists()
    listed = listed_in(step_folder(run_dir.checkpoints, 1))
    assert listed is not None
    assert (TAIL in listed.files, listed.parts) == (False, {})
    assert read(run_dir)[1].num_rows == 0


@pytest.mark.parametrize(
    "where", [checkpoint_writer, ledger], ids=["the rows of a rank", "the tail"]
)
@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_fails_the_save(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, where: Any, in_background: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(world: World) -> None:
        saves = goes_on(run_dir, None if world.size == 1 else 3, world)
        save(saves, 3, 4, in_background)
        saves.wait()

    save(goes_on(run_dir), 0, 3)
    monkeypatch.setattr(where, "write_rows", full)
    for failure in on_ranks(2, work):
        assert isinstance(failure, SaveFailed)
        assert "No space left on device" in str(failure)
    monkeypatch.undo()
    goes_on(run_dir, 3)
    assert steps(run_dir) == [1, 2, 3]
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_00000003"]


# --- reading --------------------------------------------------------------------------------------


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def test_a_broken_part_is_named(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    saves = goes_on(run_dir, keep=1)
    for step in (2, 4):
        save(saves, step - 2, step)
    assert cli.main(["verify", str(run_dir.path)]) == cli.DONE
    assert capsys.readouterr().out == "step_00000004: complete\npairs.parquet: complete\n"
    part = next(run_dir.pairs.glob("steps_*"))
    broken(part)
    assert cli.main(["verify", str(run_dir.path)]) == cli.FAILED
    assert f"pairs.parquet: {part}: its content is not what was written" in capsys.readouterr().out
    step, rows = read(run_dir)
    assert (step, sorted(set(rows["step"].to_pylist()))) == (4, [3, 4])
    goes_on(run_dir, 4)
    lost = f"{part}: its content is not what was written: its rows of the pair ledger are lost"
    assert lost in caplog.text


def test_an_unreadable_newest_checkpoint_falls_back_to_an_older_one(run_dir: RunDir) -> None:
    saves = goes_on(run_dir)
    for step in (1, 2):
        save(saves, step - 1, step)
    broken(step_folder(run_dir.checkpoints, 2) / TAIL)
    assert read(run_dir)[0] == 1


def test_reading_survives_the_deletion_of_a_checkpoint(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = goes_on(run_dir, keep=1)
    save(saves, 0, 1)
    look = ledger._tail_of

    def late(folder: Path, listed: Any) -> pa.Table:
        monkeypatch.undo()
        save(saves, 1, 2)  # the one that was about to be read is gone
        return look(folder, listed)

    monkeypatch.setattr(ledger, "_tail_of", late)
    assert read(run_dir)[0] == 2


# --- runs -----------------------------------------------------------------------------------------

STEPS = 6  # of 8 of 20 pairs: two epochs


@pytest.mark.parametrize(("precision", "ranks"), [("fp32", 2), ("fp16", 1)])
def test_the_ledger_of_a_run_equals_the_outputs_of_its_steps(
    tmp_path: Path, precision: str, ranks: int
) -> None:
    """With fillers, a batch of another size, two epochs and, in fp16, steps that were skipped."""
    pairs = write_jsonl(tmp_path / "few.jsonl", random_rows(20))
    settings = write_settings(
        tmp_path, data={"train": str(pairs), "eval": None}, training={"max_steps": STEPS}
    )
    words = [f"precision={precision}", "checkpoint.every_steps=4"]
    finish_debug(settings, *words, ranks=ranks, hook=notes_pairs)
    run_dir = tmp_path / "runs" / "tiny"
    values = [
        json.loads(line)
        for path in run_dir.glob("given*.jsonl")
        for line in path.read_text().splitlines()
    ]
    applied = {(pair["step"], pair["pair_id"]): pair for pair in values if not pair.pop("skipped")}
    assert (len(applied) < len(values)) == (precision == "fp16")
    rows = ledger_rows(run_dir)
    assert [(row["step"], row["pair_id"]) for row in rows] == sorted(applied)
    assert all(applied[row["step"], row["pair_id"]].items() <= row.items() for row in rows)
    assert len({row["epoch"] for row in rows}) > 1

    means = {"loss": "loss", "margin": "rewards/margins", "chosen_logps": "logps/chosen"}
    for line in metric_lines(run_dir):
        of_step = [row for row in rows if row["step"] == line["step"]]
        for column, name in means.items():
            assert sum(row[column] for row in of_step) / len(of_step) == pytest.approx(
                line[name], rel=1e-12
            )
        assert (
            sum(row["margin"] > 0 for row in of_step) / len(of_step) == line["rewards/accuracies"]
        )


def test_the_ledger_can_be_switched_off(tmp_path: Path) -> None:
    finish_debug(write_settings(tmp_path), "training.max_steps=1", "training.pair_ledger=false")
    assert not (tmp_path / "runs" / "tiny" / "pairs.parquet").exists()
