"""The space that checkpoints need is predicted, and a disk without it is refused."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.checks.disk import disk_needed, space_checks
from orchestrator.run.checks.report import refusal
from support.debug_runs import finish_debug
from support.failed_checks import wrong
from support.tiny_settings import tiny_spec, write_settings


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"optimizer": {"name": "torch.optim.SGD", "lr": 1e-3, "kwargs": {"momentum": 0.9}}},
        {"reference": {"kind": "shared_layers", "num_shared_layers": 1}},
        {"model": {"lora": {"r": 4}}, "reference": {"kind": "adapter_off"}},
    ],
    ids=["AdamW", "SGD with momentum", "frozen layers", "LoRA"],
)
def test_the_disk_use_of_a_run_is_predicted(tmp_path: Path, blocks: dict[str, Any]) -> None:
    blocks = {"data": {"eval": None}, "training": {"max_steps": 1}, **blocks}
    settings = write_settings(tmp_path, **blocks)
    finish_debug(settings)
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "checkpoints").glob(
        "step_*/rank_00000.safetensors"
    )
    model = tmp_path / "runs" / "tiny" / "model" / "model.safetensors"
    needed = disk_needed(tiny_spec(tmp_path, **blocks))
    headers = 30_000  # names and places of tensors
    assert 0 < checkpoint.stat().st_size - needed.checkpoint < headers
    assert 0 < model.stat().st_size - needed.model < headers
    assert needed.checkpoints == 1


def test_an_optimizer_of_unknown_state_counts_with_its_weights(tmp_path: Path) -> None:
    known = disk_needed(tiny_spec(tmp_path))
    unknown = disk_needed(tiny_spec(tmp_path, optimizer={"name": "torch.optim.Adafactor"}))
    assert known.checkpoint == 3 * unknown.checkpoint
    assert disk_needed(tiny_spec(tmp_path), own_optimizer=True) == unknown


@pytest.mark.parametrize(
    ("every", "steps", "keep", "best", "at_once"),
    [
        (None, 100, 2, None, 1),
        (10, 100, 2, None, 3),
        (10, 15, 2, None, 2),
        (10, None, 5, None, 6),
        (None, 100, 2, "loss", 4),
    ],
)
def test_the_number_of_checkpoints_on_disk_at_once_is_predicted(
    tmp_path: Path, every: int | None, steps: int | None, keep: int, best: str | None, at_once: int
) -> None:
    blocks = {
        "checkpoint": {"every_steps": every, "keep": keep},
        "evaluation": {"metric_for_best": best},
    }
    assert (
        disk_needed(tiny_spec(tmp_path, training={"max_steps": steps}, **blocks)).checkpoints
        == at_once
    )


def test_a_disk_too_small_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    enough = {"checkpoint": {"every_steps": 1, "keep": 10}, "training": {"max_steps": None}}
    assert wrong(space_checks(tiny_spec(tmp_path, **enough))) == []
    too_many = {"checkpoint": {"every_steps": 1, "keep": 10**12}, "training": {"max_steps": None}}
    (check,) = wrong(space_checks(tiny_spec(tmp_path, **too_many)))
    assert str(refusal([check])).startswith("space in run.dir = '")
    assert "(1000000000001 of 340 KB at once, and the model of 113 KB)" in check.wrong
    assert (
        "lower checkpoint.keep (1000000000000), or set run.dir to another file system" in check.cure
    )


def test_files_that_exist_already_need_no_further_space(tmp_path: Path) -> None:
    spec = tiny_spec(
        tmp_path, checkpoint={"every_steps": 1, "keep": 10}, training={"max_steps": None}
    )

    def needed() -> str:
        (check,) = space_checks(spec)
        return check.value.partition(" free, ")[2]

    assert needed() == "3.85 MB needed"
    held = spec.run_dir / "checkpoints" / "step_00000001" / "rank_00000.safetensors"
    held.parent.mkdir(parents=True)
    held.write_bytes(bytes(10**6))
    assert needed() == "2.85 MB needed"
