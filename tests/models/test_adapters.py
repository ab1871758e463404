"""An adapter is loaded only when its files hold exactly its weights, and these fit the base; else
one line says why.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.models.adapters import add_adapter, check_adapter
from orchestrator.models.loading import check_weights, config_at
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import LoraSpec
from support.tiny_parts import (
    change_weights,
    save_adapter,
    tiny_model,
    with_third_layer,
    without_layer,
)

Weights = dict[str, torch.Tensor]
FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter for it, in folders of these names."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to change."""
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


def refusals(adapter: Path, saved: Path) -> list[str]:
    """Return the errors of plan, which reads no weight of the base, and of training."""
    base = str(saved / "base")
    without_weights: Any = check_weights("model.path", base, config_at("model.path", base))
    lines = []
    for model in (without_weights, tiny_model()):
        with pytest.raises(UserError) as caught:
            add_adapter(
                model, LoraSpec(adapter_path=str(adapter)), 0, torch.float32, disable_dropout=True
            )
        assert caught.value.key == "model.lora.adapter_path"
        lines.append(str(caught.value))
    return lines


def set_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_nan(weights: Weights) -> Weights:
    weights[FACTOR][0, 0] = float("nan")
    return weights


def without_a_factor(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != FACTOR}


def with_a_prefix(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def with_dora(weights: Weights) -> Weights:
    return {**weights, FACTOR.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}


def with_embeddings(weights: Weights) -> Weights:
    return {**weights, "base_model.model.model.embed_tokens.weight": torch.ones(300, 32)}


def of_another_width(weights: Weights) -> Weights:
    return {
        name: value.repeat(1, 2) if "lora_A" in name else value for name, value in weights.items()
    }


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (with_nan, "model.layers.1.self_attn.q_proj.lora_A.weight holds NaN: 1 of its"),
        (
            without_layer,
            "newly initialised; use weights and adapter_config.json of one adapter, trained on "
            "this base",
        ),
        (
            without_a_factor,
            "weight model.layers.1.self_attn.q_proj.lora_A.weight is missing from its files",
        ),
        (with_third_layer, "does not use"),
        (with_a_prefix("module."), "'module.' of DistributedDataParallel"),
        (with_a_prefix("_orig_mod."), "'_orig_mod.' of torch.compile"),
        (with_dora, "lora_magnitude_vector"),
        (with_embeddings, "embed_tokens.weight"),
        (
            of_another_width,
            "has shape (4, 128) in its files, but the adapter of its config on this "
            "Qwen2ForCausalLM",
        ),
    ],
)
def test_weights_that_are_not_the_adapters_are_refused(
    adapter: Path, saved: Path, weights: Any, words: str
) -> None:
    change_weights(adapter / "adapter_model.safetensors", weights)
    for line in refusals(adapter, saved):
        assert words in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "needs (8, 64) (and 27 more)"),
        ({"use_dora": True}, "more than two factors per layer: use_dora"),
        ({"modules_to_save": ["lm_head"]}, "more than two factors per layer: modules_to_save"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            "more than two factors per layer: target_parameters",
        ),
        (
            {"trainable_token_indices": [3]},
            "more than two factors per layer: trainable_token_indices",
        ),
        ({"lora_bias": True}, "more than two factors per layer: lora_bias"),
        ({"bias": "all"}, "more than two factors per layer: bias"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "not LoraConfig"),
        ({"target_modules": ["query_key_value"]}, "query_key_value"),
        ({"target_modules": ["q_proj"]}, "does not use"),
    ],
)
def test_a_config_of_another_adapter_is_refused(
    adapter: Path, saved: Path, config: dict[str, Any], words: str
) -> None:
    set_config(adapter, **config)
    for line in refusals(adapter, saved):
        assert words in line
        assert "\n" not in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_a_git_lfs_pointer_is_named(adapter: Path, name: str) -> None:
    (adapter / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer"):
        check_adapter(LoraSpec(adapter_path=str(adapter)))


def test_a_truncated_file_is_named(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is truncated"):
        check_adapter(LoraSpec(adapter_path=str(adapter)))


def test_a_whole_adapter_is_loaded(adapter: Path) -> None:
    model = tiny_model()
    add_adapter(model, LoraSpec(adapter_path=str(adapter)), 0, torch.float32, disable_dropout=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        ours = name.removeprefix("base_model.model.").replace(".weight", ".policy.weight")
        assert torch.equal(parameters[ours], value)
