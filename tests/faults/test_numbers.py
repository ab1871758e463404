"""Numbers that are not finite: which rank and pairs had them, what is kept, and what is skipped."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from orchestrator.training.manifest import committed, step_of
from support.debug_runs import Ended, run_debug
from support.run_files import losses
from support.run_hooks import breaks_numbers
from support.tiny_settings import write_settings

FaultRow = Callable[[str, str, str], None]
NAN = float("nan")
ENGINES = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "fsdp": {"kind": "fsdp"},
}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return write_settings(tmp_path, checkpoint={"every_steps": 1, "keep": 1})


def saved_steps(settings: Path) -> list[int]:
    return [step_of(folder) for folder in committed(run_dir_of(settings) / "checkpoints")]


def run_dir_of(settings: Path) -> Path:
    return settings.parent / "runs" / "tiny"


def the_error(ended: Ended, step: int) -> str:
    """Check that every rank failed and that one line says why; return it."""
    assert set(ended.codes) == {1}, ended.log
    assert "Traceback" not in ended.log
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: step {step}: ")
    return line


def has_model(settings: Path) -> bool:
    run_dir = run_dir_of(settings)
    return (run_dir / "model").exists() or (run_dir / "result.json").exists()


def test_a_loss_that_is_not_finite_names_its_rank_and_pair(
    settings: Path, fault_row: FaultRow
) -> None:
    hook = partial(breaks_numbers, "loss", NAN, 1, (3,))
    line = the_error(run_debug(settings, ranks=2, hook=hook), 3)
    assert "rank 1: loss nan for pairs 6, 9 (rows 6, 9 of " in line  # the first of micro-batches
    assert "rank 0" not in line
    assert f"the last good checkpoint is {run_dir_of(settings)}/checkpoints/step_00000002" in line
    assert f"see its pairs with orchestrator debug {run_dir_of(settings)} --replay-step=3" in line
    assert saved_steps(settings) == [2]
    skip = "training.on_non_finite=skip"
    assert f"resume with {skip}" in line
    again = run_debug(settings, skip, ranks=2, hook=partial(breaks_numbers, "loss", NAN, 1, (1,)))
    assert again.codes == [0, 0], again.log
    assert "resumed after step 2" in again.stdout
    [warning] = [line for line in again.stderr.splitlines() if "skipped" in line]
    assert (
        "WARNING: step 3: the gradient is not finite: rank 1: loss nan for pairs 6, 9 " in warning
    )
    assert "skipped without an update; see its pairs with orchestrator debug " in warning
    assert sorted(losses(run_dir_of(settings))) == [1, 2, 3, 4]
    fault_row("numbers", "loss nan, rank 1, step 3", "rank and pair named; stop or skip")


def test_skips_in_a_row_end_the_run(settings: Path) -> None:
    words = ["training.on_non_finite=skip", "training.epochs=20", "training.max_steps=4"]
    hook = partial(breaks_numbers, "gradient", float("inf"), 0, tuple(range(2, 20)))
    ended = run_debug(settings, *words, hook=hook)
    line = the_error(ended, 2)
    assert "the gradient is not finite, the loss is (" in line
    assert ", after 10 skipped in a row; " in line
    assert ended.stderr.count("skipped without an update") == 10
    assert saved_steps(settings) == [1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_replace_no_checkpoint(
    settings: Path, ranks: int, fault_row: FaultRow
) -> None:
    hook = partial(breaks_numbers, "weight", NAN, ranks - 1, (3,))
    line = the_error(run_debug(settings, ranks=ranks, hook=hook), 3)
    assert "the weights model." in line
    assert saved_steps(settings) == [2]
    assert not has_model(settings)
    fault_row("numbers", "a weight nan after step 3", "not saved; last good checkpoint named")


def test_a_final_evaluation_that_is_not_finite_exports_nothing(
    settings: Path, fault_row: FaultRow
) -> None:
    words = ["optimizer.lr=1e30", "scheduler.name=constant", "training.max_steps=1"]
    ended = run_debug(settings, *words)
    line = the_error(ended, 1)
    assert "the loss of the evaluation is not finite, so no model is exported" in line
    assert "no checkpoint was saved before" in line
    assert "choose another run.name with a lower optimizer.lr (now 1e+30)" in line
    assert not has_model(settings)
    without = run_debug(settings, *words, "run.name=without", "data.eval=null")
    assert "the log-probs of the final weights are not finite" in the_error(without, 1)
    fault_row("numbers", "final evaluation nan", "exit 1, no model")


def test_a_loss_out_of_range_is_remarked_on_once_also_after_a_resume(
    settings: Path, fault_row: FaultRow
) -> None:
    words = ["optimizer.lr=10", "scheduler.name=constant", "training.max_steps=4"]
    hook = partial(breaks_numbers, "weight", NAN, 0, (4,))  # ends it after three steps
    first = run_debug(settings, *words, hook=hook)
    assert first.stderr.count("far outside its range") == 1
    assert "WARNING: step 2: loss " in first.stderr
    again = run_debug(settings, *words)
    assert again.codes == [0], again.log
    assert "far outside its range" not in again.stderr
    fault_row("numbers", "optimizer.lr=10", "remarked on once")


@pytest.mark.slow
@pytest.mark.parametrize("value", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_names_it_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, engine: str, what: str, value: float, fault_row: FaultRow
) -> None:
    settings = write_settings(
        tmp_path, checkpoint={"every_steps": 1, "keep": 1}, engine=ENGINES[engine]
    )
    hook = partial(breaks_numbers, what, value, 1, (3,))
    line = the_error(run_debug(settings, ranks=2, hook=hook), 3)
    expected = {
        "loss": "rank 1: loss ",
        "gradient": "the gradient is not finite, the loss is (",
        "weight": "are not finite; ",
    }
    assert expected[what] in line
    assert saved_steps(settings) == [2]
    if what != "weight":
        again = run_debug(settings, "training.on_non_finite=skip", ranks=2)
        assert again.codes == [0, 0], again.log
    fault_row("numbers", f"{what} {value} on {engine}, rank 1", "named; last good one kept")
