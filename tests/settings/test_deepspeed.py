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
from support.deepspeed_files import nested, refusal, with_file
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
