"""Add or load a LoRA adapter by peft, switch it off, and merge it.

The adapter layers replace layers inside the model, whose type stays the same. Names:
q_proj.base_layer.weight, q_proj.lora_A.policy.weight. peft is an optional dependency and is
imported in functions only.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.model_files import ADAPTER_FILES, check_files
from orchestrator.models.quantized import unquantized
from orchestrator.models.weight_checks import WeightDifferences, check_complete, check_finite
from orchestrator.settings.errors import UserError, message_of, type_and_message
from orchestrator.settings.load import looks_local
from orchestrator.settings.model import LoraSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the adapter that trains, and of the frozen copy of its start
POLICY, REFERENCE = "policy", "reference"
RANK = 16
# peft settings that make an adapter more than a product of two factors, the only kind that this
# file merges and switches off.
MORE_THAN_FACTORS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_dora",
    "lora_bias",
)


def add_adapter(
    model: "PreTrainedModel", spec: LoraSpec, seed: int, dtype: torch.dtype, disable_dropout: bool
) -> None:
    """Freeze the model and add a trainable adapter of `dtype`: a new one, which does not change the
    output yet, or the one at adapter_path. A loaded adapter is added twice, as the policy's and as
    a frozen copy for the reference (LLaMA-Factory 8974: the reference was the bare base).

    Raises:
        UserError: peft is not installed, peft rejects the targets, or the adapter cannot be loaded.
    """
    loaded = check_adapter(spec)
    from peft import LoraConfig

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns that the model already has an adapter
        torch.manual_seed(seed)
        if spec.adapter_path is not None:
            _load(model, spec, loaded)
        else:
            rank = spec.r or RANK
            targets: Any = spec.target_modules or "all-linear"
            alpha: Any = spec.alpha or 2 * rank
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
            try:
                model.add_adapter(config, POLICY)
            except ValueError as error:
                reason = message_of(error)
                cure = "name linear layers of this model, for example [q_proj, v_proj]"
                raise UserError(
                    "model.lora.target_modules",
                    spec.target_modules,
                    f"peft rejects it ({reason})",
                    cure,
                ) from None
    _check_layers(model, spec)
    for layer in adapter_layers(model).values():
        for dropout in layer.lora_dropout.values():
            if disable_dropout and isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)  # peft creates it in the dtype of the base
        parameter.requires_grad_(is_of(POLICY, name))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of a model that have an adapter, by name; empty if the model has no
    adapter.
    """
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_of(adapter: str, parameter: str) -> bool:
    """Return whether the parameter (or scaling) of that name belongs to that adapter."""
    return (".lora_" in parameter or ".scaling." in parameter) and f".{adapter}." in f"{parameter}."


def scalings(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the scaling of each adapter's product, by layer and adapter: no weight holds it."""
    layers = adapter_layers(model).items()
    return {
        f"{name}.scaling.{a}": torch.tensor(value)
        for name, layer in layers
        for a, value in layer.scaling.items()
    }


def base_name(parameter: str) -> str:
    """Return the name that a parameter of the base has in a model without adapters."""
    # everywhere: adapters of several parameters of a module are nested
    return parameter.replace("base_layer.", "")


@contextmanager
def adapter_off(layers: list[Any]) -> Iterator[None]:
    """Make these layers compute as at the start of training: without adapter, or with the frozen
    copy of a loaded one.

    peft's own switches also change requires_grad, even of parameters whose gradient has not been
    computed yet.
    """
    has_start = any(REFERENCE in layer.lora_A for layer in layers)
    for layer in layers:
        if has_start:
            layer._active_adapter = [REFERENCE]
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [POLICY], False


@torch.no_grad()
def without_adapter(model: "PreTrainedModel", merged: bool) -> "PreTrainedModel":
    """Replace adapter layers by plain ones, in place, and return the same model.

    merged: add the adapter's product to the weights, and convert every 8- or 4-bit layer, with or
    without an adapter, to fp32.
    """
    layers = adapter_layers(model)
    for layer in layers.values() if merged else ():
        _merge(layer)
    for name, layer in layers.items():
        # else it is nested in another adapter
        if name.removesuffix(".base_layer") not in layers.keys() - {name}:
            model.set_submodule(name, layer.get_base_layer())
    for name, layer in list(model.named_modules()) if merged else ():
        if (plain := unquantized(layer)) is not layer:
            model.set_submodule(name, plain)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit") if merged else ():
        if hasattr(model, flag):
            delattr(model, flag)
    model._hf_peft_config_loaded = False
    return model


def _merge(layer: Any) -> None:
    """Add an adapter's product to the weight of its base layer, or to a parameter of its module,
    such as experts.
    """
    base, delta = layer.get_base_layer(), layer.get_delta_weight(POLICY)
    plain = unquantized(base)
    if plain is not base:
        layer.base_layer = plain
        # Conv1D is [in, out], when quantised [out, in]
        delta = delta if isinstance(plain, nn.Linear) else delta.T
    name = _adapted_parameter(layer)
    weight = getattr(plain, name)
    setattr(plain, name, nn.Parameter((weight + delta).to(weight.dtype), requires_grad=False))


def _adapted_parameter(layer: Any) -> str:
    """Return the name, within the base layer, of the parameter that an adapter changes."""
    return getattr(layer, "parameter_name", "weight")  # peft's ParamWrapper has parameter_name


@torch.no_grad()
def check_mergeable(model: "PreTrainedModel", spec: LoraSpec) -> None:
    """Check, on fake tensors of one layer of each kind, that the adapter can be merged after
    training.

    Raises:
        UserError: peft cannot compute the product of an adapter, or its shape differs from the
            weight's.
    """
    from torch._subclasses import FakeTensorMode

    kinds = {
        (type(layer), _adapted_parameter(layer)): name
        for name, layer in adapter_layers(model).items()
    }
    for name in kinds.values():
        layer: Any = model.get_submodule(name)
        try:
            # for all experts of a layer it would be gigabytes
            with FakeTensorMode(allow_non_fake_inputs=True):
                delta = layer.get_delta_weight(POLICY)
            weight = getattr(layer.get_base_layer(), _adapted_parameter(layer))
            # quantised weights are packed
            fits = delta.shape == weight.shape or not weight.is_floating_point()
        # peft, and libraries that it calls, raise many types for an unsupported layer
        except Exception:
            fits = False
        if not fits:
            key = "model.lora.adapter_path" if spec.adapter_path else "model.lora.target_modules"
            rule = (
                f"the adapter on {name} ({type(layer).__name__}) cannot be merged when the "
                "model is exported"
            )
            raise UserError(
                key,
                spec.adapter_path or spec.target_modules,
                rule,
                "name linear layers below the head",
            )


def check_adapter(spec: LoraSpec) -> Any:
    """Check the adapter settings before any weight is loaded; return the config of the adapter at
    adapter_path, if set.

    Raises:
        UserError: peft is not installed, or adapter_path is not an adapter with two factors per
            layer.
    """
    try:
        import peft  # noqa: F401 - only checks that it is installed
    except ImportError as error:
        cure = "pip install 'dpo-orchestrator[peft]'"
        raise UserError(
            "model.lora", spec.model_dump(exclude_none=True), f"needs peft ({error})", cure
        ) from None
    return None if spec.adapter_path is None else _config_at(spec.adapter_path)


def _config_at(path: str) -> Any:
    from peft import LoraConfig, PeftConfig

    check_files("model.lora.adapter_path", path, ADAPTER_FILES)
    try:
        config = PeftConfig.from_pretrained(path)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"its type is {type(config).__name__}, not LoraConfig")
        more = [name for name in MORE_THAN_FACTORS if getattr(config, name, None)]
        if more or config.bias != "none":
            raise ValueError(
                f"it has more than two factors per layer: {', '.join(more or ['bias'])}"
            )
    # peft and the hub raise many types; all mean that it cannot be loaded
    except Exception as error:
        raise _cannot_load(path, error) from None
    config.inference_mode = False
    return config


def _cannot_load(path: str, error: Exception) -> UserError:
    cure = "use a folder with adapter_config.json, trained on this base model"
    if not looks_local(path):
        cure = f"use a hub name that can be reached, or a folder (./{path})"
    rule = f"cannot be loaded ({type_and_message(error)})"
    return UserError("model.lora.adapter_path", path, rule, cure)


def _check_layers(model: "PreTrainedModel", spec: LoraSpec) -> None:
    """Check that no adapter is on the embeddings or the head, where the reference could not switch
    it off.
    """
    for name, layer in adapter_layers(model).items():
        if (
            isinstance(layer.get_base_layer(), nn.Embedding)
            or layer is model.get_output_embeddings()
        ):
            key = "model.lora.adapter_path" if spec.adapter_path else "model.lora.target_modules"
            rule = (
                f"an adapter on {name} is not supported: it is part of the embeddings or the head"
            )
            raise UserError(
                key,
                spec.adapter_path or spec.target_modules,
                rule,
                "name linear layers below the head",
            )


def _load(model: "PreTrainedModel", spec: LoraSpec, config: Any) -> None:
    """Add the adapter at adapter_path to the model twice: one that trains, and a frozen one for the
    reference.
    """
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    path = str(spec.adapter_path)
    config.init_lora_weights = True  # other values (PiSSA, OLoRA) would change the base again
    try:
        saved = {
            k.removeprefix("base_model.model."): v
            for k, v in load_peft_weights(path, device="cpu").items()
        }
        model.add_adapter(config, REFERENCE)
        # before loading: peft's file of such an adapter also has the layer's own weights
        _check_layers(model, spec)
        _check_weights(model, path, saved)
        model.add_adapter(config, POLICY)  # the last one is active
        for name in (REFERENCE, POLICY):
            set_peft_model_state_dict(model, saved, adapter_name=name)
    except UserError:
        raise
    except Exception as error:  # peft, torch and the hub raise many types
        raise _cannot_load(path, error) from None


def _check_weights(model: "PreTrainedModel", path: str, saved: dict[str, torch.Tensor]) -> None:
    """Check that a file holds exactly the weights of the adapter that was added for it, all
    finite.
    """
    shapes = {
        name.replace(f".{REFERENCE}.", "."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if is_of(REFERENCE, name)
    }
    differences = WeightDifferences.between(
        {name: tuple(value.shape) for name, value in saved.items()}, shapes
    )
    key = "model.lora.adapter_path"
    owner = f"the adapter of its config on this {type(model).__name__}"
    fix = "use weights and adapter_config.json of one adapter, trained on this base"
    check_complete(key, path, differences, owner, fix)
    check_finite(key, path, saved.items())
