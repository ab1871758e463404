"""Settings of optimizers, schedules and engines that cannot stand together are refused by key."""

from pathlib import Path
from typing import Any

import pytest

from support.setting_rules import assert_rule
from support.tiny_settings import refused


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        (
            {"optimizer": {"name": "torch.optim.AdamV"}},
            "optimizer.name",
            ["did you mean torch.optim.Adam"],
        ),
        ({"optimizer": {"name": "Adam"}}, "optimizer.name", ["did you mean torch.optim.Adam?"]),
        (
            {"optimizer": {"name": "adamw_torch"}},
            "optimizer.name",
            ["did you mean torch.optim.AdamW?"],
        ),
        (
            {"optimizer": {"name": "paged_adamw_8bit"}},
            "optimizer.name",
            ["did you mean bitsandbytes.optim.PagedAdamW8bit?"],
        ),
        (
            {"optimizer": {"name": "bitsandbytes.optim.AdamW"}},
            "optimizer.name",
            ["did you mean bitsandbytes.optim.AdamW8bit?"],
        ),
        (
            {"optimizer": {"name": "torch.optim.Prodigy"}},
            "optimizer.name",
            ["use one of torch.optim.Adadelta, Adag"],
        ),
        ({"optimizer": {"name": "prodigyopt:"}}, "optimizer.name", ["module:attr"]),
        (
            {"optimizer": {"name": "torch.optim.LBFGS"}},
            "optimizer.name",
            ["needs a closure", "use torch.optim.AdamW"],
        ),
        (
            {"optimizer": {"name": "torch.optim.SparseAdam"}},
            "optimizer.name",
            ["only on sparse gradients"],
        ),
        ({"optimizer": {"kwargs": {"lr": 1}}}, "optimizer.kwargs.lr", ["set optimizer.lr instead"]),
        (
            {"optimizer": {"kwargs": {"weight_decay": 1}}},
            "optimizer.kwargs.weight_decay",
            ["optimizer.weight_decay"],
        ),
        ({"optimizer": {"lr": 0}}, "optimizer.lr", ["= 0", "greater than 0", "Peak learning rate"]),
        ({"scheduler": {"name": "liner"}}, "scheduler.name", ["did you mean linear?"]),
        (
            {"scheduler": {"name": "StepLR"}},
            "scheduler.name",
            ["did you mean torch.optim.lr_scheduler.StepLR?"],
        ),
        (
            {"scheduler": {"name": "sine"}},
            "scheduler.name",
            ["= 'sine'", "neither a schedule of", "did you mean"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
            "scheduler.name",
            ["needs a metric"],
        ),
        (
            {"scheduler": {"name": "reduce_lr_on_plateau"}},
            "scheduler.name",
            ["needs a metric", "use linear"],
        ),
        ({"scheduler": {"name": "greedy"}}, "scheduler.name", ["needs a metric", "use linear"]),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.SequentialLR"}},
            "scheduler.name",
            ["needs other schedulers as arguments", "from Python", "optimizers=(None,"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.LambdaLR"}},
            "scheduler.name",
            ["a function", "from Python"],
        ),
        (
            {"scheduler": {"warmup_steps": 3, "warmup_ratio": 0.1}},
            "scheduler.warmup_ratio",
            ["= 0.1", "remove one"],
        ),
        (
            {"scheduler": {"warmup_ratio": 1.5}},
            "scheduler.warmup_ratio",
            ["less than 1", "a fraction of all steps"],
        ),
        (
            {"scheduler": {"name": "cosine", "kwargs": {"num_warmup_steps": 3}}},
            "scheduler.kwargs.num_warmup_steps",
            ["= 3", "set scheduler.warmup_steps instead"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "warmup_steps": 3}},
            "scheduler.warmup_steps",
            ["= 3", "is not used by"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "warmup_ratio": 0.1}},
            "scheduler.warmup_ratio",
            ["= 0.1", "is not used by"],
        ),
        (
            {"scheduler": {"kwargs": {"gamma": 1}}},
            "scheduler.kwargs",
            ["linear has no arguments", "remove scheduler.kwargs"],
        ),
        (
            {"engine": {"kind": "zero"}},
            "engine.kind",
            ["= 'zero'", "must be one of ddp, deepspeed, fsdp"],
        ),
        (
            {"engine": {"zero_stage": 3}},
            "engine.zero_stage",
            ["= 3", "is not used by engine.kind ddp", "set engine.kind=deepspeed, or remove it"],
        ),
        (
            {"engine": {"kind": "fsdp", "deepspeed_config": {"zero_optimization": {"stage": 2}}}},
            "engine.deepspeed_config",
            ["= {'zero_optimization'", "is not used by engine.kind fsdp", "engine.kind=deepspeed"],
        ),
        (
            {"engine": {"deepspeed_config": 3}},
            "engine.deepspeed_config",
            ["= 3", "valid dictionary", "A DeepSpeed config"],
        ),
        (
            {"engine": {"overlap_comm": False}},
            "engine.overlap_comm",
            ["= False", "set engine.kind=deepspeed"],
        ),
        (
            {"engine": {"kind": "deepspeed", "reshard_after_forward": False}},
            "engine.reshard_after_forward",
            ["= False", "is not used by engine.kind deepspeed", "set engine.kind=fsdp"],
        ),
        (
            {"engine": {"kind": "fsdp", "shard_optimizer": False}},
            "engine.shard_optimizer",
            ["= False", "is not used by engine.kind fsdp", "set engine.kind=ddp"],
        ),
        (
            {"engine": {"kind": "fsdp", "bucket_size": 9}},
            "engine.bucket_size",
            ["= 9", "reduces gradients layer by layer", "remove it"],
        ),
        (
            {"engine": {"offload": "optimizer"}},
            "engine.offload",
            ["= 'optimizer'", "ddp does not support offload", "set engine.kind=deepspeed"],
        ),
        (
            {"engine": {"kind": "fsdp", "offload": "optimizer"}},
            "engine.offload",
            ["= 'optimizer'", "stored with the weights", "set engine.offload=parameters"],
        ),
        (
            {"engine": {"kind": "deepspeed", "offload": "parameters"}},
            "engine.offload",
            [
                "= 'parameters'",
                "deepspeed at stage 2 keeps the whole weights",
                "set engine.zero_stage=3, or engine.offload=op",
            ],
        ),
        (
            {"engine": {"offload": "parameters"}},
            "engine.offload",
            ["= 'parameters'", "ddp keeps the whole weights", "set engine.kind=fsdp, or"],
        ),
        (
            {
                "engine": {"kind": "deepspeed"},
                "optimizer": {"name": "deepspeed.ops.adam.DeepSpeedCPUAdam"},
            },
            "optimizer.name",
            [
                "weights in host memory",
                "set engine.offload=optimizer, or use deepspeed.ops.adam.FusedAdam",
            ],
        ),
        (
            {
                "engine": {"kind": "deepspeed", "offload": "optimizer"},
                "optimizer": {"name": "deepspeed.ops.adam.FusedAdam"},
            },
            "optimizer.name",
            [
                "weights on the GPU",
                "engine.offload is optimizer",
                "use deepspeed.ops.adam.DeepSpeedCPUAdam",
            ],
        ),
    ],
)
def test_each_rule_names_key_value_rule_and_cure(
    tmp_path: Path, blocks: dict[str, Any], key: str, words: list[str]
) -> None:
    assert_rule(refused(tmp_path, **blocks), key, words)
