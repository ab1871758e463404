"""Build the reference from a user's function ref_model (policy -> reference)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.head_check import check_head
from orchestrator.models.layers import decoder_layers, lowest
from orchestrator.models.quantized import is_quantized
from orchestrator.models.reference import Reference, SharedLayers
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.user_code import call_user_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RefModel = Callable[["PreTrainedModel"], "PreTrainedModel"]
"""A user's function (policy -> reference), called on every rank before any wrapping."""

KEY = "ref_model"  # its name in messages


def check_function(ref_model: RefModel | None) -> None:
    """Check that ref_model is a function and not a model.

    Raises:
        UserError: it is not a function; a model cannot be sent to every rank.
    """
    if isinstance(ref_model, nn.Module) or not (ref_model is None or callable(ref_model)):
        rule = "must be a function (policy -> reference): a model cannot be sent to every rank"
        cure = "wrap it in a function, for example lambda policy: create_reference_model(policy, 6)"
        raise UserError(KEY, type(ref_model).__name__, rule, cure)


def reference_of_function(
    spec: RunSpec, policy: "PreTrainedModel", ref_model: RefModel, device: torch.device
) -> Reference:
    """Build the reference from the model that a user's function returns; lowest layers that share
    the policy's memory become SharedLayers, which run once.

    Raises:
        UserError: it did not return a causal LM with the policy's vocabulary, or one that would
            train with the policy.
    """
    settings, name = spec.reference, getattr(ref_model, "__name__", type(ref_model).__name__)
    model: Any = call_user_code(KEY, name, "when the reference is built", ref_model, policy)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # unwraps peft's model, and keeps the adapter layers
    _check_model(model, policy, name)
    count = _layers_in_common(policy, model)
    _check_settings(spec, model, count)
    reference: Reference
    if count is not None:
        reference = SharedLayers(_with_layers_of(policy, model, count), policy, count)
        reference.check_runs_separately(policy)
    else:
        # a 4-bit model does not support .to()
        stays = settings.offload or settings.sharded or model.device == device
        reference = Reference(model if stays else model.to(device))
    reference.is_start = _equals_policy(reference, policy)
    return reference


def _check_model(model: Any, policy: "PreTrainedModel", name: str) -> None:
    """Check that the function returned a frozen causal LM with the policy's vocabulary."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        example = "for example ref_model=lambda policy: AutoModelForCausalLM.from_pretrained(...)"
        rule = f"returned a {type(model).__name__}"
        raise UserError(KEY, name, rule, f"return a causal LM, {example}")
    sizes = [config.get_text_config().vocab_size for config in (policy.config, model.config)]
    if sizes[0] != sizes[1]:
        rule = f"returned a model with a vocabulary of {sizes[1]} tokens, the policy has {sizes[0]}"
        raise UserError(KEY, name, rule, "use a reference with the policy's tokenizer")
    check_head(model)
    trained = {p.data_ptr(): n for n, p in policy.named_parameters() if p.requires_grad}
    both = [trained[p.data_ptr()] for p in model.parameters() if p.data_ptr() in trained]
    if both:
        rule = f"returned a model that holds the policy's {both[0]}, which trains"
        fix = "return a copy, for example by create_reference_model(policy, 6)"
        raise UserError(KEY, name, rule, fix)


def _check_settings(spec: RunSpec, model: Any, count: int | None) -> None:
    """Check that the settings support a model that shares `count` layers, or is quantised."""
    if count is not None and not spec.model.disable_dropout:
        rule = (
            "the policy's dropout would reach the reference through the layers that ref_model "
            "shares"
        )
        fix = "set it to true, or do not share layers"
        raise UserError("model.disable_dropout", False, rule, fix)
    if spec.reference.offload and (count is not None or is_quantized(model)):
        held = "shares layers with the policy" if count is not None else "is in 8 or 4 bits"
        raise UserError("reference.offload", True, f"the model from ref_model {held}", "remove it")
    if spec.reference.sync_every and is_quantized(model):
        rule = "the model from ref_model is in 8 or 4 bits, which cannot be updated in small steps"
        raise UserError("reference.sync_every", spec.reference.sync_every, rule, "remove it")


def _layers_in_common(policy: "PreTrainedModel", model: "PreTrainedModel") -> int | None:
    """Return how many of the lowest layers share the policy's memory; None if not even the
    embeddings do.
    """

    def addresses(module: nn.Module) -> list[int]:
        return [p.data_ptr() for p in module.parameters()]

    if addresses(policy.get_input_embeddings()) != addresses(model.get_input_embeddings()):
        return None
    pairs = zip(decoder_layers(policy), decoder_layers(model), strict=False)
    for number, (layer, other) in enumerate(pairs):
        if addresses(layer) != addresses(other):
            return number
    return None  # all layers are shared: none is left to run separately


def _with_layers_of(
    policy: "PreTrainedModel", model: "PreTrainedModel", count: int
) -> "PreTrainedModel":
    """Replace modules of the model that share the policy's memory by the policy's, so that they
    stay shared when moved or cast.
    """
    shared = {id(m) for m in lowest(policy, count)}
    for name, module in policy.named_modules():
        if id(module) in shared:
            model.set_submodule(name, module)
    return model


def _equals_policy(reference: Reference, policy: "PreTrainedModel") -> bool:
    """Return whether the reference equals the policy, weight for weight."""
    ours, theirs = policy.state_dict(), reference.tensors()
    if ours.keys() != theirs.keys():
        return False
    return all(
        ours[name].dtype == value.dtype
        and ours[name].shape == value.shape
        and torch.equal(ours[name], value)
        for name, value in theirs.items()
    )
