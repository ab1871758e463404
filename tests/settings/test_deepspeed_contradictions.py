"""Each contradiction between a DeepSpeed file and the settings is one line with its fix."""

from pathlib import Path
from typing import Any

import pytest

from support.deepspeed_files import nested, refusal

AUTO = '"auto" in the file'
REFUSED: list[
    tuple[dict[str, Any], dict[str, Any], str, str, str]
] = [  # file, settings, path, rule, cure
    (
        {"gradient_clipping": 0.5},
        {},
        "gradient_clipping = 0.5",
        "contradicts training.max_grad_norm = 1.0",
        f"make them equal, or set {AUTO}",
    ),
    (
        {"gradient_clipping": 0.0},
        {},
        "gradient_clipping = 0.0",
        "contradicts training.max_grad_norm = 1.0",
        AUTO,
    ),
    (
        {"gradient_clipping": 1.0},
        {"training": {"max_grad_norm": None}},
        "gradient_clipping = 1.0",
        "contradicts training.max_grad_norm = null",
        AUTO,
    ),
    (
        {"train_batch_size": 16},
        {},
        "train_batch_size = 16",
        "contradicts batch.global_batch_size = 8",
        AUTO,
    ),
    (
        {"train_micro_batch_size_per_gpu": 1},
        {},
        "train_micro_batch_size_per_gpu = 1",
        "contradicts batch.micro_batch_size = 2",
        AUTO,
    ),
    (
        {"train_micro_batch_size_per_gpu": 64},
        {"batch": {"micro_batch_size": None, "max_tokens_per_microbatch": 64}},
        "train_micro_batch_size_per_gpu = 64",
        "contradicts batch.max_tokens_per_microbatch = 64",
        AUTO,
    ),
    (
        {"gradient_accumulation_steps": 1},
        {"cluster": {"num_workers": 2}},
        "gradient_accumulation_steps = 1",
        "2 ranks with micro-batches of 2 need 2 for batch.global_batch_size = 8",
        'set "auto" or 2',
    ),
    (
        {"gradient_accumulation_steps": 2},
        {"cluster": {"num_workers": [1, 2]}},
        "gradient_accumulation_steps = 2",
        "the number of ranks",
        AUTO,
    ),
    (
        {"gradient_accumulation_steps": 1},
        {"batch": {"micro_batch_size": None, "max_tokens_per_microbatch": 64}},
        "gradient_accumulation_steps = 1",
        "the lengths of pairs",
        AUTO,
    ),
    (
        {"bf16": {"enabled": True}},
        {"precision": "auto"},
        "bf16.enabled = True",
        "contradicts precision = auto",
        f"set precision=bf16, or {AUTO}",
    ),
    (
        {"fp16": {"enabled": True}},
        {},
        "fp16.enabled = True",
        "contradicts precision = fp32",
        "set precision=fp16",
    ),
    (
        {"bf16": {"enabled": False}},
        {"precision": "bf16"},
        "bf16.enabled = False",
        "contradicts precision = bf16",
        "another precision",
    ),
    (
        {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
        {"precision": "auto"},
        "bf16.enabled = False",
        "with fp16.enabled = false it means fp32",
        "set precision=fp32",
    ),
    (
        {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        {"precision": "bf16"},
        "fp16.enabled = True",
        "bf16.enabled is also true",
        "enable only one",
    ),
    (
        {"communication_data_type": "fp16"},
        {},
        "communication_data_type = 'fp16'",
        "precision is fp32",
        "or remove it from the file",
    ),
    (
        {"fp16": {"loss_scale": 128}},
        {"precision": "fp16"},
        "fp16.loss_scale = 128",
        "all engines use the same loss scale",
        "remove it from the file",
    ),
    (
        {"fp16": {"initial_scale_power": 32}},
        {"precision": "fp16"},
        "fp16.initial_scale_power = 32",
        "starts at 65536",
        "remove it",
    ),
    (
        {"optimizer": {"type": "SGD"}},
        {},
        "optimizer.type = 'SGD'",
        "contradicts optimizer.name = torch.optim.AdamW",
        AUTO,
    ),
    (
        {"optimizer": {"type": "Adam"}},
        {"optimizer": {"name": "torch.optim.Adam"}},
        "optimizer.type = 'Adam'",
        "contradicts optimizer.name = torch.optim.Adam",
        AUTO,
    ),
    (
        {"optimizer": {"params": {"lr": 1e-4}}},
        {},
        "optimizer.params.lr = 0.0001",
        "contradicts optimizer.lr = 0.001",
        AUTO,
    ),
    (
        {"optimizer": {"params": {"weight_decay": 0}}},
        {},
        "optimizer.params.weight_decay = 0",
        "optimizer.weight_decay = 0.1",
        AUTO,
    ),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
        {},
        "optimizer.params.betas = [0.9, 0.999]",
        "optimizer.kwargs.betas = [0.9, 0.95]",
        AUTO,
    ),
    (
        {"optimizer": {"params": {"eps": 1e-6}}},
        {},
        "optimizer.params.eps = 1e-06",
        "optimizer.kwargs.eps = 1e-08",
        AUTO,
    ),
    (
        {"optimizer": {"params": {"freeze_step": 9}}},
        {},
        "optimizer.params.freeze_step = 9",
        "kwargs.freeze_step = (not set)",
        AUTO,
    ),
    (
        {"scheduler": {"type": "WarmupLR"}},
        {},
        "scheduler.type = 'WarmupLR'",
        "contradicts scheduler.name = linear",
        "set scheduler.name=constant_with_warmup, or remove the block scheduler",
    ),
    (
        {"scheduler": {"type": "OneCycle"}},
        {},
        "scheduler.type = 'OneCycle'",
        "scheduler.name = linear",
        "remove the",
    ),
    (
        {"scheduler": {"params": {"warmup_num_steps": 3}}},
        {},
        "scheduler.params.warmup_num_steps = 3",
        "the settings define the schedule",
        "scheduler.warmup_steps",
    ),
    (
        {"zero_optimization": {"stage": 3}},
        {"engine": {"zero_stage": 2}},
        "zero_optimization.stage = 3",
        "contradicts engine.zero_stage = 2",
        AUTO,
    ),
    (
        {"zero_optimization": {"stage": 0}},
        {},
        "zero_optimization.stage = 0",
        "shards nothing",
        "set engine.kind=ddp",
    ),
    (
        {"zero_optimization": {"stage": "2"}},
        {},
        "zero_optimization.stage = '2'",
        "is not a ZeRO stage",
        "set 1, 2 or 3",
    ),
    (
        {"zero_optimization": {"overlap_com": True}},
        {},
        "zero_optimization.overlap_com = True",
        "is not a DeepSpeed key",
        "did you mean overlap_comm?",
    ),
    (
        {"zero_optimization": True},
        {},
        "zero_optimization = True",
        "must be a block of keys",
        "remove it",
    ),
    ({"fp16": None}, {}, "fp16 = (not set)", "must be a block of keys", "remove it"),
    (
        nested("zero_optimization.offload_optimizer.device", "cpu"),
        {},
        "zero_optimization.offload_optimizer.device = 'cpu'",
        "contradicts engine.offload = none",
        f"set engine.offload=optimizer, or {AUTO}",
    ),
    (
        nested("zero_optimization.offload_optimizer.device", "none"),
        {"engine": {"offload": "optimizer"}},
        "zero_optimization.offload_optimizer.device = 'none'",
        "contradicts engine.offload = optimizer",
        "set engine.offload=none",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"engine": {"offload": "optimizer"}},
        "zero_optimization.offload_param.device = 'cpu'",
        "contradicts engine.offload = optimizer",
        "set engine.offload=parameters",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}},
        {"engine": {"offload": "parameters"}},
        "zero_optimization.offload_optimizer.device = 'none'",
        "contradicts engine.offload = parameters",
        'set "cpu" in the file',
    ),
    (
        nested("zero_optimization.offload_optimizer.device", "nvme"),
        {},
        "zero_optimization.offload_optimizer.device = 'nvme'",
        "checkpoints are written from memory",
        'set "cpu"',
    ),
    (
        nested("zero_optimization.offload_param.device", "gpu"),
        {},
        "zero_optimization.offload_param.device = 'gpu'",
        "is not a device",
        'set "cpu" or "none"',
    ),
    (
        nested("zero_optimization.reduce_bucket_size", 5e8),
        {"engine": {"bucket_size": 1000}},
        "zero_optimization.reduce_bucket_size = 500000000.0",
        "contradicts engine.bucket_size = 1000",
        AUTO,
    ),
    (
        nested("zero_optimization.overlap_comm", True),
        {"engine": {"overlap_comm": False}},
        "zero_optimization.overlap_comm = True",
        "contradicts engine.overlap_comm = False",
        AUTO,
    ),
]


@pytest.mark.parametrize(("file", "blocks", "path", "rule", "cure"), REFUSED)
def test_each_contradiction_is_one_line(
    tmp_path: Path, file: dict[str, Any], blocks: dict[str, Any], path: str, rule: str, cure: str
) -> None:
    error = refusal(tmp_path, file, **blocks)
    assert str(error).startswith(f"engine.deepspeed_config.{path}: ")
    assert "\n" not in str(error)
    assert rule in error.rule
    assert cure in error.cure
