"""Load tokenizer, config and weights of a model folder or hub name, and reject incomplete ones."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.models.mapped import load_mapped
from orchestrator.models.model_files import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    check_files,
    check_weight_files,
)
from orchestrator.models.weight_checks import WeightDifferences, check_complete, check_finite
from orchestrator.settings.errors import UserError, type_and_message
from orchestrator.settings.load import looks_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Config keys that must be at least 1 in every model; architectures use two sets of names.
LAYERS = ("num_hidden_layers", "n_layer")
SIZES = (
    *LAYERS,
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_positions",
)
MOST_LAYERS, MOST = 10_000, 2**31 - 1

# The hub's libraries would otherwise prompt on stdin before they run code that comes with a model.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def tokenizer_at(key: str, path: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a folder or the hub. key: the setting that holds the path.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    _check_folder(key, path)
    check_files(key, path, TOKENIZER_FILES)
    try:
        return AutoTokenizer.from_pretrained(path, **NO_CODE)
    # transformers and the hub raise many types; all mean that it cannot be loaded
    except Exception as error:
        raise _cannot_load(key, path, "tokenizer", error) from None


def config_at(key: str, path: str) -> Any:
    """Load the config of a model from a folder or the hub. key: the setting that holds the path.

    Raises:
        UserError: it cannot be loaded, or its weights are quantised and would have to train.
    """
    from transformers import AutoConfig

    _check_folder(key, path)
    check_files(key, path, CONFIG_FILES)
    try:
        config = AutoConfig.from_pretrained(path, **NO_CODE)
    except Exception as error:
        raise _cannot_load(key, path, "model config", error) from None
    text = config.get_text_config()
    for name in SIZES:
        for value in _values(text, name):
            if rule := wrong_size(name, value):
                fix = "fix it in its config.json"
                raise UserError(key, path, f"{name} = {value!r} in its config {rule}", fix)
    if key == "model.path":
        _check_not_quantized(key, path, config)
    return config


def _values(config: Any, name: str) -> list[Any]:
    """Return a value of a config; where it is one of each layer, those of all layers."""
    try:
        return [getattr(config, name, None)]
    except RuntimeError:  # what transformers raises then
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def wrong_size(name: str, value: Any) -> str:
    """Return why no model can have this value in its config; empty if one can."""
    most = MOST_LAYERS if name in LAYERS else MOST
    if name not in SIZES or not isinstance(value, int) or 1 <= value <= most:
        return ""
    return "must be 1 or more" if value < 1 else f"must be {most} or less"


def read_model(
    key: str, path: str, config: Any, dtype: torch.dtype, mapped: bool
) -> "PreTrainedModel":
    """Load a causal LM with weights of `dtype` on the CPU; mapped: see `load_mapped`.

    Raises:
        UserError: it cannot be loaded, or its weights are not complete, not all used, or not
            finite.
    """
    from transformers import AutoModelForCausalLM

    check_weight_files(key, path)
    load = load_mapped if mapped else AutoModelForCausalLM.from_pretrained
    model = _load_complete(key, path, load, config=config, dtype=dtype)
    check_finite(key, path, model.named_parameters())
    return model


def check_weights(key: str, path: str, config: Any) -> "PreTrainedModel | None":
    """Check names and shapes of the weights in a folder, without reading their values; return the
    model without them.

    transformers itself loads the model on the meta device, so its renaming and merging of weights
    is taken into account. None for a hub name, whose weights are checked when they are loaded, and
    for quantised weights, which cannot be loaded without a device.

    Raises:
        UserError: the weights cannot be loaded, are incomplete, or are not all used.
    """
    from transformers import AutoModelForCausalLM

    if not os.path.isdir(path):
        return None
    check_weight_files(key, path)
    if getattr(config, "quantization_config", None) is not None:
        return None
    options: dict[str, Any] = {"config": config, "dtype": torch.float32, "device_map": "meta"}
    return _load_complete(key, path, AutoModelForCausalLM.from_pretrained, **options)


def _check_folder(key: str, path: str) -> None:
    """Check that a local path is a folder.

    Raises:
        UserError: the path does not exist, or is a file.
    """
    if looks_local(path) and not os.path.isdir(path):
        raise UserError(key, path, "is not a folder", "use an existing folder or a hub name")


def _cannot_load(key: str, path: str, what: str, error: Exception) -> UserError:
    """Return the error to raise where a part of a model cannot be loaded."""
    if "trust_remote_code=True" in str(error):  # in the message of transformers' refusal
        rule = f"its {what} needs code that comes with it (auto_map), which is never run"
        return UserError(key, path, rule, "use a model whose architecture is part of transformers")
    if "Padding_idx must be within" in str(error):  # torch.nn.Embedding, of transformers
        rule = "pad_token_id in its config.json is not a token of its vocabulary"
        return UserError(
            key, path, rule, "set pad_token_id to null there: padding needs no token of the model"
        )
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        cure = "it is an adapter: merge it into its base first"
        if key == "model.path":
            cure = (
                "it is an adapter: set model.path to its base and model.lora.adapter_path to this"
            )
    elif os.path.isdir(path):
        cure = "use a folder with config.json, tokenizer and weights"
    else:
        cure = f"use a hub name that can be reached, or a folder (./{path})"
    return UserError(key, path, f"its {what} cannot be loaded ({type_and_message(error)})", cure)


def _load_complete(key: str, path: str, load: Callable[..., Any], **options: Any) -> Any:
    """Call `from_pretrained` or `load_mapped`, and check the weights it reports as missing, unused
    or mismatched.
    """
    try:
        model, info = load(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options, **NO_CODE
        )
    except Exception as error:  # transformers, safetensors and the hub raise many types
        raise _cannot_load(key, path, "model", error) from None
    check_complete(
        key, path, WeightDifferences.from_loading_info(info), f"a {type(model).__name__}"
    )
    return model


def _check_not_quantized(key: str, path: str, config: Any) -> None:
    """Check that a checkpoint to train is not quantised: only its other layers would train."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method") or "bitsandbytes"
    rule = f"its weights are quantised ({method}) and cannot train"
    fix = (
        "use the checkpoint in 16 or 32 bits; model.lora.base=nf4 quantises a frozen base in memory"
    )
    raise UserError(key, path, rule, fix)
