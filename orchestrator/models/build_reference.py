"""Build the reference model that the settings describe, before any wrapping."""

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.adapters import without_adapter
from orchestrator.models.layers import decoder_layers, freeze_lowest, head_is_tied, lowest
from orchestrator.models.loading import check_weights, config_at, tokenizer_at
from orchestrator.models.mapped import mapped_twin
from orchestrator.models.policy import cast_to, load_model
from orchestrator.models.quantized import quantized
from orchestrator.models.reference import AdapterOff, PolicyStart, Reference, SharedLayers
from orchestrator.models.reference_function import RefModel, reference_of_function
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_reference(
    spec: RunSpec,
    policy: "PreTrainedModel",
    dtype: torch.dtype,
    ref_model: RefModel | None = None,
    device: torch.device | None = None,
    with_exact: bool = True,
) -> Reference:
    """Build the reference from the settings or from a user's function.

    policy: before its first step and before any wrapping. dtype: that of the run's weights. device:
    where the reference will run (default: the policy's device); one to be sharded stays on the
    policy's device until then. with_exact: keep the model that it approximates, to measure the
    error.

    Raises:
        UserError: the other model cannot be loaded, or does not support this kind of reference.
    """
    settings = spec.reference
    device = policy.device if device is None or settings.sharded else device
    if ref_model is not None:
        reference = reference_of_function(spec, policy, ref_model, device)
    elif settings.kind == "shared_layers":
        reference = _shared_layers(spec, policy)
    elif settings.kind == "adapter_off":
        reference = AdapterOff(policy)
    elif settings.traits.is_precomputed and settings.path is None:
        reference = PolicyStart(policy)
    else:
        reference = _copy(spec, policy, dtype, device, with_exact)
    reference.is_precomputed = settings.traits.is_precomputed
    if settings.sync_every is not None:
        _prepare_sync(reference, policy)
    if settings.offload:
        reference.offload(device)
    for each in (reference, reference.exact):
        if each is not None:
            each.ld_alpha = spec.dpo.ld_alpha
    return reference


# --- shared layers --------------------------------------------------------------------------------


def create_reference_model(
    model: "PreTrainedModel", num_shared_layers: int | None = None, pattern: str | None = None
) -> "PreTrainedModel":
    """Return a frozen copy of a model, like TRL's function of this name. With num_shared_layers,
    the embeddings and lowest layers are not copied: both models share these modules, which are
    frozen.

    An output head tied to the embeddings is untied in `model` and keeps training; in the copy it
    stays tied.

    pattern: the name of a layer's parameters with {layer} for its number ("transformer.h.{layer}"),
    for models whose layers are not found automatically.

    Raises:
        ValueError: the model has no layers of that name, or none left above the shared ones.
    """
    if num_shared_layers is None:
        return copy.deepcopy(model).requires_grad_(False).eval()
    layers: Any
    if pattern is None:
        layers = decoder_layers(model)
    else:
        try:
            layers = model.get_submodule(pattern.partition("{layer}")[0].rstrip("."))
        except AttributeError as error:
            raise ValueError(
                f"pattern {pattern!r} does not match any layers of this model: {error}"
            ) from None
    if not 0 <= num_shared_layers < len(layers):
        raise ValueError(
            f"num_shared_layers = {num_shared_layers}: the model has {len(layers)} layers"
        )
    return _sharing(model, num_shared_layers, keep_head=True, layers=layers)


def _shared_layers(spec: RunSpec, policy: "PreTrainedModel") -> SharedLayers:
    count = spec.reference.num_shared_layers
    assert count is not None  # a rule of the settings
    keep_head = spec.model.tied_head == "untie"
    model = _sharing(policy, count, keep_head, twin=spec.reference.sharded)
    reference = SharedLayers(model, policy, count)
    reference.is_start = True
    reference.check_runs_separately(policy)
    return reference


def _sharing(
    model: "PreTrainedModel",
    count: int,
    keep_head: bool,
    layers: nn.ModuleList | None = None,
    twin: bool = False,
) -> "PreTrainedModel":
    """Return a frozen copy that shares embeddings and lowest layers; keep_head: see freeze_lowest.

    twin: its own weights stay in the model's memory until an engine shards both.
    """
    was_tied = freeze_lowest(model, count, keep_head, layers)
    lower = lowest(model, count, layers)
    one: dict[int, Any] = {}
    if twin:
        one = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    one |= {id(x): x for m in lower for x in (m, *m.parameters())}
    if was_tied:
        head: Any = model.get_output_embeddings()
        # tied, as it was before freeze_lowest
        one[id(head.weight)] = model.get_input_embeddings().weight
    other = copy.deepcopy(model, one)  # deepcopy does not copy objects in its memo
    models = set(model.modules())
    for module in other.modules():
        if module not in models:
            module.training = False
    return other.requires_grad_(False)


# --- a copy, or another model ---------------------------------------------------------------------


def _copy(
    spec: RunSpec,
    policy: "PreTrainedModel",
    dtype: torch.dtype,
    device: torch.device,
    with_exact: bool,
) -> Reference:
    """Build a copy of the policy's start or load the model at reference.path, in reference.dtype or
    quantised.
    """
    settings = spec.reference
    path, is_quantised = settings.path, settings.traits.is_quantized
    full: Any = policy  # the model that the reference is, or approximates
    if path is not None:
        dropout = spec.model.disable_dropout
        full = load_model("reference.path", path, dropout, dtype, mapped=settings.sharded)
    elif spec.model.lora is not None or not is_quantised:
        full = _start_of(spec, policy)
    if is_quantised:
        # its layers return their input's dtype, and autocast cannot mix two 16-bit dtypes
        if full.dtype != dtype:
            full = cast_to(full, "fp32")
        model = quantized(full, settings.kind, device)  # pyright: ignore[reportArgumentType]
    else:
        model = full
        if settings.dtype is not None:
            model = cast_to(copy.deepcopy(full) if path else full, settings.dtype)
        if not settings.offload:
            model = model.to(device)  # pyright: ignore[reportArgumentType]
    reference = Reference(model)
    reference.is_start = path is None
    if path is not None and settings.is_approximate and with_exact:
        reference.exact = Reference(full)
        # it may not fit the device, which is why it is approximated
        reference.exact.offload(device)
    return reference


def _start_of(spec: RunSpec, policy: "PreTrainedModel") -> Any:
    """Copy the policy as it starts: without a new adapter; with a loaded one, which is merged if
    layers will be quantised.
    """
    device, lora = policy.device, spec.model.lora
    if spec.reference.offload or spec.reference.is_approximate:
        policy.to("cpu")  # pyright: ignore[reportArgumentType] - two models may not fit the device
    start = mapped_twin(policy) if spec.reference.sharded else copy.deepcopy(policy)
    policy.to(device)  # pyright: ignore[reportArgumentType]
    has_loaded = lora is not None and lora.adapter_path is not None
    if lora is None or (has_loaded and not spec.reference.traits.is_quantized):
        return start
    return without_adapter(start, merged=has_loaded)


# --- a reference that is synced -------------------------------------------------------------------


def _prepare_sync(reference: Reference, policy: "PreTrainedModel") -> None:
    """Prepare the reference for `sync`.

    Raises:
        UserError: a weight of the reference has no counterpart of the same shape in the policy.
    """
    reference.is_synced = True
    if head_is_tied(reference.model) and not head_is_tied(policy):  # the policy's was untied
        head: Any = reference.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        if isinstance(reference, SharedLayers):
            name = next(n for n, m in reference.model.named_modules() if m is head)
            reference.own.add(f"{name}.weight")
    in_policy = dict(policy.named_parameters(remove_duplicate=False))
    for name, value in reference.synced_weights().items():
        if name not in in_policy or in_policy[name].shape != value.shape:
            there = tuple(in_policy[name].shape) if name in in_policy else "no such weight"
            rule = f"{name} of the reference has shape {tuple(value.shape)}, the policy {there}"
            cure = "remove it, or use a reference of the policy's architecture"
            raise UserError("reference.sync_every", "set", rule, cure)


# --- checks before any weight is loaded -----------------------------------------------------------


def check_reference(
    spec: RunSpec, policy_config: Any, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Check, before any weight is loaded, that another model as reference has the policy's tokens.

    Raises:
        UserError: its config or tokenizer cannot be loaded, its vocabulary has another size, or its
            tokenizer another token.
    """
    path = spec.reference.path
    if path is None:
        return
    cure = "use a reference with the policy's tokenizer"
    config = config_at("reference.path", path)
    sizes = [c.get_text_config().vocab_size for c in (policy_config, config)]
    if sizes[0] != sizes[1]:
        rule = f"has a vocabulary of {sizes[1]} tokens, the policy of {sizes[0]}"
        raise UserError("reference.path", path, rule, cure)
    check_weights("reference.path", path, config)
    other_tokenizer = _tokenizer_at(path)
    if other_tokenizer is None:
        return
    ids, other_ids = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    different = [token for token in ids if other_ids.get(token) != ids[token]]
    if different:
        token = min(different, key=ids.__getitem__)
        other = other_ids.get(token)
        rule = f"its tokenizer maps {token!r} to id {other}, the policy's to {ids[token]}"
        raise UserError("reference.path", path, f"{rule} ({len(different)} tokens differ)", cure)


def _tokenizer_at(path: str) -> Any:
    """Load the tokenizer of a model; None if it has none: a folder with weights only is a valid
    reference.
    """
    if os.path.isdir(path) and not any(
        "token" in name or "vocab" in name for name in os.listdir(path)
    ):
        return None  # transformers would create an empty one
    try:
        return tokenizer_at("reference.path", path)
    except UserError:
        if os.path.isdir(path):
            raise
        return None  # the hub only reports that a file is missing
