"""The reference model and its variants: copy, shared layers, adapter off, precomputed.

Legend: 2B sequences, R rows, T tokens, H hidden size.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.data.collate import PairBatch
from orchestrator.models.adapters import (
    POLICY,
    adapter_layers,
    adapter_off,
    base_name,
    is_of,
    scalings,
    without_adapter,
)
from orchestrator.models.layers import (
    UpperLayers,
    captured_at,
    decoder_layers,
    freeze_lowest,
    lowest,
)
from orchestrator.models.layout_check import small_batches
from orchestrator.models.loading import check_weights, config_at, tokenizer_at
from orchestrator.models.logps import body_hidden, layout_of, sequence_logps
from orchestrator.models.mapped import mapped_twin
from orchestrator.models.policy import cast_to, check_head, load_model
from orchestrator.models.quantized import is_quantized, quantized
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RefModel = Callable[["PreTrainedModel"], "PreTrainedModel"]
"""A user's function (policy -> reference), called on every rank before any wrapping."""

# Relative error of hidden states: rounding is far below it, one layer too many or too few far above
# it.
UPPER_TOLERANCE = 1e-3


class Reference:
    """A separate frozen model. Deliberately not an nn.Module, so that a module that holds it
    registers no parameter.
    """

    model: "PreTrainedModel"
    capture_layer: int | None = (
        None  # the layer of the policy whose input it needs; None for a separate model
    )
    is_start = False  # True if its weights are those that the policy starts with
    exact: "Reference | None" = (
        None  # another model that it approximates, until the error is measured
    )
    is_synced = False  # True if `sync` will be called
    ld_alpha: float | None = None  # dpo.ld_alpha: it sums a sequence as the policy does
    weights: dict[str, torch.Tensor] = {}  # empty unless it is a separate model

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.requires_grad_(False).eval()
        self.weights = dict(model.named_parameters(remove_duplicate=False))

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64.

        captured: [R, T, H] the input of capture_layer in the policy; unused.
        """
        return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """Return the size in bytes of the weights that it does not share with the policy."""
        policys = {tensor.data_ptr() for tensor in policy.state_dict().values()}
        own = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors().values()}
        return sum(size for pointer, size in own.items() if pointer not in policys)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors that its log-probs depend on, by name."""
        state: dict[str, torch.Tensor] = self.model.state_dict() | scalings(self.model)
        return {name: self.weights.get(name, value) for name, value in state.items()}

    def synced_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that `sync` changes, and that a checkpoint must hold, by name: tied
        ones once, without the policy's.
        """
        if not self.is_synced:
            return {}
        first: dict[int, str] = {}
        for name, weight in self.weights.items():
            first.setdefault(id(weight), name)
        return {name: self.weights[name] for name in first.values()}

    @torch.no_grad()
    def sync(self, policys: "Mapping[str, torch.Tensor]", alpha: float) -> None:
        """Set reference = alpha * policy + (1 - alpha) * reference.

        TR-DPO, arXiv 2404.09656, eq. 8.

        policys: the policy's weights by name, in the layout of this reference's: whole, or the same
        shards.
        """
        for name, own in self.synced_weights().items():
            own.mul_(1 - alpha).add_(policys[name].to(own.device), alpha=alpha)

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return the modules that a sharding engine must shard besides the policy's; they share no
        weight with it.
        """
        return [self.model]

    def refresh_weights(self) -> None:
        """Look up the weights again after an engine has replaced them by shards."""
        self.weights = dict(self.model.named_parameters(remove_duplicate=False))

    def offload(self, device: torch.device) -> None:
        """Keep the weights in host memory; each layer's are on the device only while it runs."""
        from accelerate import cpu_offload

        on_host = {id(p): p.detach().cpu() for p in self.weights.values()}  # tied ones once
        self.weights = {name: on_host[id(p)] for name, p in self.weights.items()}
        for buffer in self.model.buffers():  # small, and not offloaded
            buffer.data = buffer.data.to(device)
        cpu_offload(self.model, device, state_dict=self.weights)


class SharedLayers(Reference):
    """A model whose lowest layers are the policy's own modules: frozen, stored once, and run once
    per micro-batch.
    """

    def __init__(self, model: "PreTrainedModel", policy: "PreTrainedModel", count: int) -> None:
        training = policy.training
        super().__init__(model)
        policy.train(training)  # eval() has gone through the shared layers
        self.capture_layer = count
        self.upper = UpperLayers(model, count)
        policys = {id(p) for p in policy.parameters()}
        self.own = {name for name, p in model.named_parameters() if id(p) not in policys}

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64, from the upper layers, or without captured states from
        the whole model.
        """
        if captured is None:
            return super().__call__(batch)
        with torch.no_grad():
            return sequence_logps(
                self.model, batch, self.upper(captured, **layout_of(batch)), self.ld_alpha
            )

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return the upper layers, and all other modules of the model that hold weights of their
        own.
        """
        policys = {id(p) for p in policy.parameters()}
        found: list[nn.Module] = list(decoder_layers(self.model)[self.capture_layer :])
        inside = {
            module
            for layer in (*found, *lowest(policy, self.capture_layer or 0))
            for module in layer.modules()
        }
        for module in self.model.modules():
            held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            own = [tensor for tensor in held if id(tensor) not in policys]
            if own and module not in inside:
                found.append(module)
        return found

    def synced_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that `sync` changes: those of the upper layers."""
        return {name: value for name, value in super().synced_weights().items() if name in self.own}


class PolicyStart(Reference):
    """The policy before its first step: computes log-probs for the cache, and is not used as
    reference afterwards.
    """

    is_start = True

    def __init__(self, policy: "PreTrainedModel") -> None:
        self.model = policy

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64."""
        training = self.model.training
        self.model.eval()  # without dropout
        try:
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)
        finally:
            self.model.train(training)

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """Return 0: every weight is the policy's."""
        return 0

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return no module: every weight is the policy's."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the base and the frozen copy of a loaded adapter, by name, without the adapter
        that trains.
        """
        state = self.model.state_dict() | scalings(self.model)
        return {base_name(name): value for name, value in state.items() if not is_of(POLICY, name)}


class AdapterOff(PolicyStart):
    """The policy without its adapter, or with the frozen copy of the one it started from."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__(policy)
        self.layers = list(adapter_layers(policy).values())

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Return the log-probs [2B] in fp64.

        Dropout would affect them; the rules of the settings require it off.
        """
        with adapter_off(self.layers):
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)


class Absent(Reference):
    """A reference without a model, whose log-probs are all in the cache
    (reference.kind=precomputed).
    """

    is_start = True

    def __init__(self) -> None:
        pass

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """Return no module: there is no model."""
        return []

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Raise an error: there is no model to compute log-probs with.

        Raises:
            UserError: a pair has no log-probs: the cache could not be written, or changed during
                training.
        """
        raise UserError(
            "reference.kind",
            "precomputed",
            f"the log-probs of pairs {batch.pair_ids.tolist()} are not all in the cache",
            "run the same command again, with enough free space in data.cache_dir",
        )


# --- identity and checks --------------------------------------------------------------------------


def identity_of(
    tensors: dict[str, torch.Tensor],
    config: Any,
    world: World,
    types: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:
    """Return what a model's log-probs depend on: its config and the sha256 of its weights.
    Collective: each rank hashes a part of the weights.

    types: dtypes of the weights that an engine will cast (see types_when_cut); they are hashed in
    these.
    """
    named = sorted(tensors.items())
    mine: list[str] = []
    for name, tensor in named[world.rank :: world.size]:
        tensor = tensor.to((types or {}).get(name, tensor.dtype))
        content: Any = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        mine.append(hashlib.sha256(content).hexdigest())
    digests = world.gather(mine)
    whole = [(name, digests[i % world.size][i // world.size]) for i, (name, _) in enumerate(named)]
    kept = {
        k: v
        for k, v in config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    kept = json.loads(json.dumps(kept, sort_keys=True, default=str))
    return {"weights": hashlib.sha256(json.dumps(whole).encode()).hexdigest(), "config": kept}


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
    theirs = _tokenizer_at(path)
    if theirs is None:
        return
    ours, others = tokenizer.get_vocab(), theirs.get_vocab()
    different = [token for token in ours if others.get(token) != ours[token]]
    if different:
        token = min(different, key=ours.__getitem__)
        rule = (
            f"its tokenizer maps {token!r} to id {others.get(token)}, the policy's to {ours[token]}"
        )
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


# --- building a reference -------------------------------------------------------------------------


def build_reference(
    spec: RunSpec,
    policy: "PreTrainedModel",
    dtype: torch.dtype,
    ref_model: RefModel | None = None,
    device: torch.device | None = None,
) -> Reference:
    """Build the reference from the settings or from a user's function.

    policy: before its first step and before any wrapping. dtype: that of the run's weights. device:
    where the reference will run (default: the policy's device); one to be sharded stays on the
    policy's device until then.

    Raises:
        UserError: the other model cannot be loaded, or does not support this kind of reference.
    """
    wanted = spec.reference
    device = policy.device if device is None or wanted.sharded else device
    if ref_model is not None:
        made = _of_function(spec, policy, ref_model, device)
    elif wanted.kind == "shared_layers":
        assert wanted.num_shared_layers is not None  # a rule of the settings
        count, keep_head = wanted.num_shared_layers, spec.model.tied_head == "untie"
        made = SharedLayers(_sharing(policy, count, keep_head, twin=wanted.sharded), policy, count)
        made.is_start = True
        _check_upper(made, policy)
    elif wanted.kind == "adapter_off":
        made = AdapterOff(policy)
    elif wanted.kind == "precomputed" and wanted.path is None:
        made = PolicyStart(policy)
    else:
        made = _copy(spec, policy, dtype, device)
    if wanted.sync_every is not None:
        _let_move(made, policy)
    if wanted.offload:
        made.offload(device)
    for judge in (made, made.exact):
        if judge is not None:
            judge.ld_alpha = spec.dpo.ld_alpha
    return made


def place(
    reference: Reference, policy: "PreTrainedModel", device: torch.device, dtype: torch.dtype | None
) -> None:
    """Move the reference's own weights to the device and cast them to a dtype (None: keep
    theirs).
    """
    for module in reference.own_modules(policy):
        for tensor in (*module.parameters(), *module.buffers()):
            if (
                tensor.is_floating_point()
            ):  # others are the codes of a quantised layer, already on the device
                is_buffer = not isinstance(tensor, nn.Parameter)  # rotary frequencies are not cast
                tensor.data = tensor.data.to(device, None if is_buffer else dtype)


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
        one[id(head.weight)] = (
            model.get_input_embeddings().weight
        )  # tied, as it was before freeze_lowest
    made = copy.deepcopy(model, one)  # deepcopy does not copy objects in its memo
    models = set(model.modules())
    for module in made.modules():
        if module not in models:
            module.training = False
    return made.requires_grad_(False)


def _copy(
    spec: RunSpec, policy: "PreTrainedModel", dtype: torch.dtype, device: torch.device
) -> Reference:
    """Build a copy of the policy's start or load the model at reference.path, in reference.dtype or
    quantised.
    """
    wanted = spec.reference
    full: Any = policy  # the model that the reference is, or approximates
    if wanted.path is not None:
        full = load_model(
            "reference.path", wanted.path, spec.model.disable_dropout, dtype, mapped=wanted.sharded
        )
    elif spec.model.lora is not None or not wanted.traits.is_quantized:
        full = _start_of(spec, policy)
    if wanted.traits.is_quantized:
        if (
            full.dtype != dtype
        ):  # its layers return their input's dtype, and autocast cannot mix two 16-bit dtypes
            full = cast_to(full, "fp32")
        model = quantized(full, wanted.kind, device)  # pyright: ignore[reportArgumentType]
    else:
        model = full
        if wanted.dtype is not None:
            model = cast_to(copy.deepcopy(full) if wanted.path else full, wanted.dtype)
        if not wanted.offload:
            model = model.to(device)  # pyright: ignore[reportArgumentType]
    made = Reference(model)
    made.is_start = wanted.path is None
    if wanted.path is not None and wanted.is_approximate:
        made.exact = Reference(full)
        made.exact.offload(device)  # it may not fit the device, which is why it is approximated
    return made


def _start_of(spec: RunSpec, policy: "PreTrainedModel") -> Any:
    """Copy the policy as it starts: without a new adapter; with a loaded one, which is merged if
    layers will be quantised.
    """
    device, lora = policy.device, spec.model.lora
    if spec.reference.offload or spec.reference.is_approximate:
        policy.to("cpu")  # pyright: ignore[reportArgumentType] - two models may not fit the device
    start = mapped_twin(policy) if spec.reference.sharded else copy.deepcopy(policy)
    policy.to(device)  # pyright: ignore[reportArgumentType]
    goes_on, is_quantised = (
        lora is not None and lora.adapter_path is not None,
        spec.reference.traits.is_quantized,
    )
    if lora is None or (goes_on and not is_quantised):
        return start
    return without_adapter(start, merged=goes_on)


def _let_move(reference: Reference, policy: "PreTrainedModel") -> None:
    """Prepare the reference for `sync`.

    Raises:
        UserError: a weight of the reference has no counterpart of the same shape in the policy.
    """
    theirs = dict(policy.named_parameters(remove_duplicate=False))
    reference.is_synced = True
    head, embeddings = (
        reference.model.get_output_embeddings(),
        reference.model.get_input_embeddings(),
    )
    assert head is not None
    policys_head: Any = policy.get_output_embeddings()
    if (
        head.weight is embeddings.weight
        and policys_head.weight is not policy.get_input_embeddings().weight
    ):
        head.weight = nn.Parameter(
            head.weight.detach().clone(), requires_grad=False
        )  # the policy's head was untied
        name = next(n for n, m in reference.model.named_modules() if m is head)
        reference.weights[f"{name}.weight"] = head.weight
        if isinstance(reference, SharedLayers):
            reference.own.add(f"{name}.weight")
    for name, value in reference.synced_weights().items():
        if name not in theirs or theirs[name].shape != value.shape:
            there = tuple(theirs[name].shape) if name in theirs else "no such weight"
            rule = f"{name} of the reference has shape {tuple(value.shape)}, the policy {there}"
            cure = "remove it, or use a reference of the policy's architecture"
            raise UserError("reference.sync_every", "set", rule, cure)


@torch.no_grad()
def _check_upper(reference: SharedLayers, policy: "PreTrainedModel") -> None:
    """Check, by a forward pass, that the upper layers of the model can run separately.

    Raises:
        UserError: their hidden states differ from those of the whole model.
    """
    _, batch = small_batches(policy.device)
    training = policy.training
    policy.eval()
    try:
        expected = body_hidden(reference.model, batch)
        with captured_at(policy, reference.capture_layer) as captured:
            body_hidden(policy, batch)
        found = reference.upper(captured[0], **layout_of(batch))
        error = ((found - expected).abs().amax() / expected.abs().amax()).item()
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        error = float("inf")
    finally:
        policy.train(training)
    if not error <= UPPER_TOLERANCE:
        raise UserError(
            "reference.kind",
            "shared_layers",
            f"the upper layers of a {type(policy).__name__} cannot run separately (they differ by "
            f"{error:.1e})",
            "set reference.kind=copy and model.num_frozen_layers",
        )


# --- a user's function ----------------------------------------------------------------------------


def check_function(ref_model: RefModel | None) -> None:
    """Check that ref_model is a function and not a model.

    Raises:
        UserError: it is not a function; a model cannot be sent to every rank.
    """
    if isinstance(ref_model, nn.Module) or not (ref_model is None or callable(ref_model)):
        rule = "must be a function (policy -> reference): a model cannot be sent to every rank"
        cure = "wrap it in a function, for example lambda policy: create_reference_model(policy, 6)"
        raise UserError("ref_model", type(ref_model).__name__, rule, cure)


def _of_function(
    spec: RunSpec, policy: "PreTrainedModel", ref_model: RefModel, device: torch.device
) -> Reference:
    """Build the reference from the model that a user's function returns; lowest layers that share
    the policy's memory become SharedLayers, which run once.

    Raises:
        UserError: it did not return a causal LM with the policy's vocabulary, or one that would
            train with the policy.
    """
    key, name = "ref_model", getattr(ref_model, "__name__", type(ref_model).__name__)
    wanted = spec.reference
    if not wanted.traits.is_copy or wanted.path is not None or wanted.dtype is not None:
        rule = "the settings define the reference too"
        raise UserError(
            key, name, rule, "remove reference.kind, reference.path and reference.dtype"
        )
    model: Any = ref_model(policy)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # unwraps peft's model, and keeps the adapter layers
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        cure = "for example ref_model=lambda policy: AutoModelForCausalLM.from_pretrained(...)"
        raise UserError(
            key, name, f"returned a {type(model).__name__}", f"return a causal LM, {cure}"
        )
    sizes = [config.get_text_config().vocab_size for config in (policy.config, model.config)]
    if sizes[0] != sizes[1]:
        rule = f"returned a model with a vocabulary of {sizes[1]} tokens, the policy has {sizes[0]}"
        raise UserError(key, name, rule, "use a reference with the policy's tokenizer")
    check_head(model)
    trained = {p.data_ptr(): n for n, p in policy.named_parameters() if p.requires_grad}
    both = [trained[p.data_ptr()] for p in model.parameters() if p.data_ptr() in trained]
    if both:
        rule = f"returned a model that holds the policy's {both[0]}, which trains"
        raise UserError(
            key, name, rule, "return a copy, for example by create_reference_model(policy, 6)"
        )
    count = _layers_in_common(policy, model)
    if count is not None and not spec.model.disable_dropout:
        rule = (
            "the policy's dropout would reach the reference through the layers that ref_model "
            "shares"
        )
        raise UserError(
            "model.disable_dropout", False, rule, "set it to true, or do not share layers"
        )
    held = "shares layers with the policy" if count is not None else "is in 8 or 4 bits"
    if wanted.offload and (count is not None or is_quantized(model)):
        raise UserError("reference.offload", True, f"the model from ref_model {held}", "remove it")
    if wanted.sync_every and is_quantized(model):
        rule = "the model from ref_model is in 8 or 4 bits, which cannot be updated in small steps"
        raise UserError("reference.sync_every", wanted.sync_every, rule, "remove it")
    if count is not None:
        made = SharedLayers(_with_the_policys(model, policy, count), policy, count)
        _check_upper(made, policy)
    else:
        stays = (
            wanted.offload or wanted.sharded or model.device == device
        )  # a 4-bit model does not support .to()
        made = Reference(model if stays else model.to(device))
    made.is_start = _equal(policy, made)
    return made


def _layers_in_common(policy: "PreTrainedModel", model: "PreTrainedModel") -> int | None:
    """Return how many of the lowest layers share the policy's memory; None if not even the
    embeddings do.
    """

    def is_one(ours: nn.Module, theirs: nn.Module) -> bool:
        return [p.data_ptr() for p in ours.parameters()] == [
            p.data_ptr() for p in theirs.parameters()
        ]

    if not is_one(policy.get_input_embeddings(), model.get_input_embeddings()):
        return None
    for number, (ours, theirs) in enumerate(
        zip(decoder_layers(policy), decoder_layers(model), strict=False)
    ):
        if not is_one(ours, theirs):
            return number
    return None  # all layers are shared: none is left to run separately


def _with_the_policys(
    model: "PreTrainedModel", policy: "PreTrainedModel", count: int
) -> "PreTrainedModel":
    """Replace modules of the model that share the policy's memory by the policy's, so that they
    stay shared when moved or cast.
    """
    ours = {id(m) for m in lowest(policy, count)}
    for name, module in policy.named_modules():
        if id(module) in ours:
            model.set_submodule(name, module)
    return model


def _equal(policy: "PreTrainedModel", reference: Reference) -> bool:
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
