"""Build the trainable causal LM and its tokenizer from the settings."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.order import PairCost
from orchestrator.models.adapters import add_adapter
from orchestrator.models.behaviour import silence, still_noise
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.fused import fuse
from orchestrator.models.head_check import check_head
from orchestrator.models.layers import body_of, freeze_lowest
from orchestrator.models.loading import config_at, read_model, tokenizer_at
from orchestrator.models.mapped import load_saved, weights_aside
from orchestrator.models.new_model import (
    new_config,
    new_model,
    new_weights,
    quiet_config,
    trained_tokenizer,
)
from orchestrator.models.quantized import quantized
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import Dtype, LoraSpec
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(spec: RunSpec) -> "PreTrainedTokenizerBase":
    """Load the run's tokenizer; for model.init, train it once on data.train and keep it in the
    cache.

    Raises:
        UserError: it cannot be loaded, or has no token to pad with.
    """
    model = spec.model
    key = "model.tokenizer" if model.tokenizer or model.init else "model.path"
    if model.init and not model.tokenizer:
        source = str(trained_tokenizer(model.init, spec))
    else:
        source = model.tokenizer or model.path or ""
    tokenizer = tokenizer_at(key, source)
    if model.pad_token is not None:
        if model.pad_token not in tokenizer.get_vocab():
            rule, fix = "is not in the tokenizer's vocabulary", "use one that is"
            raise UserError("model.pad_token", model.pad_token, rule, fix)
        tokenizer.pad_token = model.pad_token
    _check_special_tokens(tokenizer, key, source)
    if spec.data.chat_template is not None:
        tokenizer.chat_template = spec.data.chat_template
    return tokenizer


def _check_special_tokens(tokenizer: "PreTrainedTokenizerBase", key: str, source: str) -> None:
    """Check that a tokenizer has a token to pad with and one that ends a text."""
    if tokenizer.pad_token_id is None:
        eos = tokenizer.eos_token
        fix = "set model.pad_token to a token of its vocabulary"
        if eos:
            fix = f"set model.pad_token='{eos}'"
        raise UserError(key, source, "has a tokenizer without a pad token", fix)
    if tokenizer.eos_token_id is None:
        rule = "has a tokenizer without an end token"
        raise UserError(key, source, rule, "use a tokenizer with eos_token set")


def load_config(spec: RunSpec, tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Load the config of the policy, without its weights."""
    if spec.model.init is None:
        return config_at("model.path", str(spec.model.path))
    return new_config(spec.model.init, tokenizer)


def build_policy(
    spec: RunSpec,
    tokenizer: "PreTrainedTokenizerBase",
    dtype: torch.dtype,
    device: torch.device | None = None,
    mapped: bool = False,
) -> "PreTrainedModel":
    """Build the policy on a device (default: the CPU), with trainable weights of `dtype`. Newly
    initialised weights depend on run.seed only.

    mapped: for an engine that shards weights, on the CPU, so that no process holds its own copy.
    The weights are mapped files in the dtype of the files, and the engine casts each to `dtype`
    when it shards it, unless model.lora.base sets another dtype, which they then have already. A
    base in 8 or 4 bits is not mapped.

    Raises:
        UserError: it cannot be loaded, or does something between hidden states and logits that we
            would leave out.
    """
    lora = spec.model.lora
    mapped = mapped and not (lora is not None and lora.quantized_base)
    if spec.model.path is not None:
        model = load_model("model.path", spec.model.path, spec.model.disable_dropout, dtype, mapped)
    elif mapped:
        folder = new_weights(spec, tokenizer, dtype)
        model = load_saved(folder, quiet_config(spec, tokenizer), dtype)
        check_head(model)
        fuse(model)
    else:
        model = new_model(spec, tokenizer, dtype)
        fuse(model)
    if lora is not None:
        model = _with_adapter(model, lora, spec, dtype, device or model.device)
    elif spec.model.num_frozen_layers is not None and not spec.reference.traits.shares_layers:
        freeze_lowest(
            model, spec.model.num_frozen_layers, keep_head=spec.model.tied_head == "untie"
        )
    if spec.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers makes the embeddings' output require a gradient, which only reentrant
        # checkpointing needs
        model.disable_input_require_grads()
    model = model.to(device or model.device).train()  # pyright: ignore[reportArgumentType]
    if spec.model.disable_dropout:
        still_noise(model)
    return model


def _with_adapter(
    model: "PreTrainedModel",
    lora: LoraSpec,
    spec: RunSpec,
    dtype: torch.dtype,
    device: torch.device,
) -> "PreTrainedModel":
    """Return the model as a frozen base, quantised or cast as model.lora.base says, with a
    trainable adapter.
    """
    if lora.quantized_base is not None:
        model = quantized(model, lora.quantized_base, device)
    elif lora.cast_base is not None:
        model = cast_to(model, lora.cast_base)
    with weights_aside(model, dtype) if lora.base is None else nullcontext():
        add_adapter(model, lora, spec.run.seed, dtype, spec.model.disable_dropout)
    return model


def cast_to(model: "PreTrainedModel", dtype: Dtype) -> "PreTrainedModel":
    """Cast the weights of a model in place, and return it. Buffers stay as they are, as in
    from_pretrained: rotary frequencies in 16 bits would rotate late positions by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    fuse(model)
    return model


def load_model(
    key: str, path: str, disable_dropout: bool, dtype: torch.dtype, mapped: bool = False
) -> "PreTrainedModel":
    """Load a causal LM from a folder or the hub with weights of `dtype`, on the CPU; mapped: see
    `load_mapped`.
    """
    config = config_at(key, path)
    if disable_dropout:
        silence(config)
    model = read_model(key, path, config, dtype, mapped)
    check_head(model)
    fuse(model, dtype if mapped else None)
    return model


def pair_cost(model: "PreTrainedModel") -> PairCost:
    """Return the cost of a token in this model, in multiplications."""
    text = model.config.get_text_config()
    body = [m for m in body_of(model).modules() if not isinstance(m, torch.nn.Embedding)]
    matrices = {p for module in body for p in module.parameters(recurse=False) if p.ndim >= 2}
    # from the layers, not from the config: in some models heads differ by layer, others have no
    # attention
    queries = sum(
        getattr(m, "out_features", 0)
        for name, m in model.named_modules()
        if name.endswith("q_proj")
    )
    return PairCost(
        token=sum(p.numel() for p in matrices),
        scored=text.vocab_size * text.hidden_size,
        seen=2 * (queries or getattr(text, "num_hidden_layers", 0) * text.hidden_size),
    )
