"""A DeepSpeed config that agrees with the settings is accepted; contradictions and unsupported
features are errors.
"""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.deepspeed import contradictions
from orchestrator.settings.deepspeed_keys import FEATURES, GONE, ZERO_KEYS
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec, save_spec
from orchestrator.settings.run import RunSpec
from support.repository import ROOT
from support.tiny_settings import tiny_spec

ZERO = "zero_optimization"
# The file of Hugging Face's guide, stage 2.
HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
            "torch_adam": True,
        },
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "training": {"max_grad_norm": 1.0},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "kwargs": {"betas": [0.9, 0.95]}},
}


def with_file(folder: Path, file: Any, **blocks: Any) -> RunSpec:
    """Settings of a run under DeepSpeed with that file."""
    path = folder / "ds.json"
    path.write_text(json.dumps(file))
    engine = {"kind": "deepspeed", "deepspeed_config": str(path), **blocks.pop("engine", {})}
    merged = {
        name: {**SETTINGS.get(name, {}), **block}
        for name, block in blocks.items()
        if isinstance(block, dict)
    }
    return tiny_spec(folder, **{**SETTINGS, **blocks, **merged, "engine": engine})


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def refusal(folder: Path, file: Any, **blocks: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        with_file(folder, file, **blocks)
    return caught.value


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_presets_are_accepted(tmp_path: Path, stage: int) -> None:
    preset = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    engine = {"kind": "deepspeed", "deepspeed_config": str(preset)}
    for offload in ("none", "optimizer"):
        for precision in ("auto", "bf16", "fp16", "fp32"):
            spec = tiny_spec(tmp_path, engine={**engine, "offload": offload}, precision=precision)
            assert spec.engine.stage == stage
    assert spec.engine.deepspeed_config == json.loads(preset.read_text())


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_the_file_of_hugging_faces_guide_is_taken(tmp_path: Path, precision: str) -> None:
    assert with_file(tmp_path, HUGGING_FACE, precision=precision).engine.stage == 2
    assert list(contradictions(with_file(tmp_path, {}))) == []


AGREED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"gradient_clipping": 1}, {}),
    ({"gradient_clipping": 0.0}, {"training": {"max_grad_norm": None}}),
    ({"gradient_clipping": None}, {}),
    (
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
        },
        {},
    ),
    ({"gradient_accumulation_steps": 2}, {"cluster": {"num_workers": 2}}),
    ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, {"precision": "fp32"}),
    ({"bf16": {"enabled": True, "immediate_grad_update": True}}, {"precision": "bf16"}),
    ({"fp16": {"enabled": False}}, {"precision": "bf16"}),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 2000, "hysteresis": 1}},
        {"precision": "fp16"},
    ),
    ({"fp16": {"enabled": False, "initial_scale_power": 32}}, {}),  # which then does not act
    ({"communication_data_type": "bf16"}, {"precision": "bf16"}),
    (
        {
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
            }
        },
        {},
    ),
    ({"optimizer": {"type": "Adam", "params": {"eps": 1e-8}}}, {}),  # which in DeepSpeed is AdamW
    (
        {"optimizer": {"type": "Adam"}},
        {"optimizer": {"name": "torch.optim.Adam", "weight_decay": 0}},
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        {"optimizer": {"name": "torch.optim.Adam"}},
    ),
    ({"optimizer": {"type": "AdamW"}}, {"optimizer": {"name": "deepspeed.ops.adam.FusedAdam"}}),
    (
        {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}},
        {"optimizer": {"name": "torch.optim.SGD", "kwargs": {"momentum": 0.9}}},
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        {"scheduler": {"name": "constant", "warmup_steps": 2}},
    ),
    ({"zero_optimization": {"stage": "auto"}}, {"engine": {"zero_stage": 1}}),
    ({"zero_optimization": "auto"}, {"engine": {"zero_stage": 3}}),
    (nested("zero_optimization.offload_optimizer", None), {"engine": {"offload": "optimizer"}}),
    (
        nested("zero_optimization.offload_optimizer.device", "cpu"),
        {"engine": {"offload": "optimizer"}},
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
        {"engine": {"offload": "parameters"}},
    ),
    (nested("zero_optimization.reduce_bucket_size", 1e6), {"engine": {"bucket_size": 1000000}}),
    (
        {
            "tensor_parallel": {"autotp_size": 1},
            "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        },
        {},
    ),
    (
        {
            "activation_checkpointing": {"cpu_checkpointing": False, "number_checkpoints": None},
            "wandb": {},
        },
        {},
    ),
    ({"tensorboard": {"enabled": True}, "comms_logger": {"enabled": True}, "dump_state": True}, {}),
]


@pytest.mark.parametrize(("file", "blocks"), AGREED)
def test_a_deepspeed_file_that_agrees_with_the_settings_is_accepted(
    tmp_path: Path, file: dict[str, Any], blocks: dict[str, Any]
) -> None:
    assert with_file(tmp_path, file, **blocks).engine.deepspeed_config == file


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


ASKING = {  # a value that asks for the feature, where True does not
    "compile": {"deepcompile": True},
    "data_efficiency": {"enabled": True},
    "data_types.keep_in_fp32_modules": ["rotary"],
    "bf16.check_grad_overflow": False,
    "gradient_allreduce_op": "sum",
    "gradient_predivide_factor": 2.0,
    "managed_gradient_accumulation": False,
    "sequence_parallel_size": 2,
    "tensor_parallel.autotp_size": 2,
    "zero_optimization.offload_optimizer.ratio": 0.3,
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
}


@pytest.mark.parametrize("path", FEATURES)
def test_deepspeed_options_that_change_numbers_are_refused(tmp_path: Path, path: str) -> None:
    feature = FEATURES[path]
    for value in (None, "auto", *(feature.may_be or (False, {}))):
        assert with_file(tmp_path, nested(path, value)).engine.kind == "deepspeed"
    error = refusal(tmp_path, nested(path, ASKING.get(path, True)))
    assert error.key == f"engine.deepspeed_config.{path}"
    assert (error.rule, error.cure) == (feature.why, feature.cure)


@pytest.mark.parametrize("path", GONE)
def test_deepspeed_options_that_it_rejects_are_refused_even_when_off(
    tmp_path: Path, path: str
) -> None:
    error = refusal(tmp_path, nested(path, False))
    assert error.key == f"engine.deepspeed_config.{path}"
    assert "no longer supported by DeepSpeed" in error.rule


def names_in(file: str, block: str) -> set[str]:
    """Keys of a dict, or fields and aliases of a class, in DeepSpeed's source: to import it takes
    seconds.
    """
    actual = find_spec("deepspeed")
    assert actual is not None
    assert actual.origin is not None
    for node in ast.parse((Path(actual.origin).parent / "runtime" / file).read_text()).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == block
            and isinstance(node.value, ast.Dict)
        ):
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
        if isinstance(node, ast.ClassDef) and node.name == block:
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            calls = [line.value for line in fields if isinstance(line.value, ast.Call)]
            words = [word for call in calls for word in call.keywords if word.arg == "alias"]
            return {ast.unparse(line.target) for line in fields} | {
                ast.literal_eval(word.value) for word in words
            }
    raise AssertionError(f"{file} has no {block}")


def test_deepspeed_has_the_private_names_we_use() -> None:
    gone = names_in("config.py", "_REMOVED_ZERO_CONFIG_KEYS")
    assert set(GONE) == names_in("config.py", "_REMOVED_TOP_LEVEL_CONFIG_KEYS") | {
        f"{ZERO}.{key}" for key in gone
    }
    assert set(ZERO_KEYS) == names_in("zero/config.py", "DeepSpeedZeroConfig")
    assert {path.split(".")[1] for path in FEATURES if path.startswith(ZERO)} <= set(ZERO_KEYS)


def test_the_file_is_read_once_and_kept_with_the_settings(tmp_path: Path) -> None:
    spec = with_file(tmp_path, HUGGING_FACE)
    (tmp_path / "ds.json").unlink()
    save_spec(spec, tmp_path / "config.yaml")
    assert load_spec(tmp_path / "config.yaml") == spec


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, "cannot be read (No such file"),
        ("{", "is not valid JSON: "),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_file_that_is_not_a_deepspeed_configuration_is_refused(
    tmp_path: Path, text: str | None, rule: str
) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        tiny_spec(tmp_path, engine={"kind": "deepspeed", "deepspeed_config": str(path)})
    assert caught.value.key == "engine.deepspeed_config"
    assert caught.value.value == str(path)
    assert rule in caught.value.rule
    assert "configs/deepspeed/zero2.json" in caught.value.cure
