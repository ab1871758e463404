"""An optimizer runs under those engines that leave its maths alone."""

from pathlib import Path

import pytest

from orchestrator.settings.optim import optimizer_kind
from support.tiny_settings import refused, tiny_spec

MUON, ADAFACTOR, EIGHT_BIT = (
    "torch.optim.Muon",
    "torch.optim.Adafactor",
    "bitsandbytes.optim.PagedAdamW8bit",
)
FUSED, MINE, ADAMW = "deepspeed.ops.adam.FusedAdam", "prodigyopt:Prodigy", "torch.optim.AdamW"
ADAGRAD = "torch.optim.Adagrad"


@pytest.mark.parametrize(
    ("name", "refusals"),
    [
        (ADAMW, {}),
        (
            MUON,
            {"deepspeed": "flattens into one vector: it would raise", "fsdp": "some rows of each"},
        ),
        (ADAFACTOR, {"deepspeed": "silently compute something else", "fsdp": "some rows of each"}),
        (
            EIGHT_BIT,
            {"deepspeed": "shards of deepspeed would split", "fsdp": "shards of fsdp would split"},
        ),
        (ADAGRAD, {"deepspeed": "rebuilt by deepspeed with one parameter group"}),
        (FUSED, dict.fromkeys(("ddp", "ddp whole", "fsdp"), "set engine.kind=deepspeed")),
        (
            MINE,
            dict.fromkeys(
                ("ddp", "deepspeed", "fsdp"), "engine.kind=ddp and engine.shard_optimizer=false"
            ),
        ),
    ],
)
def test_each_optimizer_runs_where_its_maths_survives(
    name: str, refusals: dict[str, str], tmp_path: Path
) -> None:
    for engine in ("ddp", "ddp whole", "deepspeed", "fsdp"):
        blocks = {
            "optimizer": {"name": name},
            "engine": {"kind": engine.partition(" ")[0], "shard_optimizer": engine != "ddp whole"},
        }
        if engine in refusals:
            error = refused(tmp_path, **blocks)
            assert error.key == "optimizer.name"
            assert refusals[engine] in str(error)
        else:
            assert tiny_spec(tmp_path, **blocks).optimizer.name == name


def test_each_optimizer_has_a_kind_of_maths() -> None:
    kinds = {
        name: optimizer_kind(name) for name in (ADAMW, FUSED, MUON, ADAFACTOR, EIGHT_BIT, MINE)
    }
    assert list(kinds.values()) == [
        "elementwise",
        "elementwise",
        "whole",
        "whole",
        "whole",
        "unknown",
    ]
