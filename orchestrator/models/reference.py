"""The frozen judge: the model whose log-probs the policy's are measured against, in each way to have one.

Legend: 2B sequences, R rows, T tokens, H hidden size.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

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
from orchestrator.models.layers import UpperLayers, captured_at, decoder_layers, freeze_lowest, lowest
from orchestrator.models.loading import check_weights, config_at, tokenizer_at
from orchestrator.models.logps import body_hidden, layout_of, sequence_logps, small_batches
from orchestrator.models.mapped import mapped_twin
from orchestrator.models.policy import cast_to, check_head, load_model
from orchestrator.models.quantized import is_quantized, quantized
from orchestrator.settings.spec import Quantized, RunSpec, UserError
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RefModel = Callable[["PreTrainedModel"], "PreTrainedModel"]
"""A Python user's reference: called on every rank with the policy, before anything is wrapped."""

UPPER_TOLERANCE = 1e-3  # of hidden states, relative; rounding is far below it, a layer too many or few far above


class Reference:
    """A frozen model of its own. Not an nn.Module on purpose: whoever holds it registers no parameter."""

    model: "PreTrainedModel"
    capture_layer: int | None = None  # the layer of the policy whose input it wants; a model of its own needs none
    is_start = False  # whether its weights are those that the policy starts with
    exact: "Reference | None" = None  # another model that it approximates, until the error is measured
    moves = False  # whether `sync` will be called
    ld_alpha: float | None = None  # of dpo: it sums a sequence as the policy does
    weights: dict[str, torch.Tensor] = {}  # none of its own, unless it is a model of its own

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.requires_grad_(False).eval()
        self.weights = dict(model.named_parameters(remove_duplicate=False))

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64. `captured` [R, T, H] is what entered capture_layer in the policy; unused here."""
        return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """Memory of its weights that are not the policy's as well."""
        policys = {tensor.data_ptr() for tensor in policy.state_dict().values()}
        own = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors().values()}
        return sum(size for pointer, size in own.items() if pointer not in policys)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that its log-probs depend on, by name."""
        state: dict[str, torch.Tensor] = self.model.state_dict() | scalings(self.model)
        return {name: self.weights.get(name, value) for name, value in state.items()}

    def moving(self) -> dict[str, torch.Tensor]:
        """Weights that `sync` changes, and that a checkpoint must keep, by name: tied ones once, the policy's not."""
        if not self.moves:
            return {}
        first: dict[int, str] = {}
        for name, weight in self.weights.items():
            first.setdefault(id(weight), name)
        return {name: self.weights[name] for name in first.values()}

    @torch.no_grad()
    def sync(self, policys: "Mapping[str, torch.Tensor]", alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference. TR-DPO, arXiv 2404.09656, eq. 8.

        policys: its weights by name, held as those of this reference are: whole, or the same shards.
        """
        for name, own in self.moving().items():
            own.mul_(1 - alpha).add_(policys[name].to(own.device), alpha=alpha)

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """What an engine that shards weights is to shard with the policy: none of it is the policy's."""
        return [self.model]

    def were_wrapped(self) -> None:
        """Find the weights again after an engine has put shards in their place."""
        self.weights = dict(self.model.named_parameters(remove_duplicate=False))

    def offload(self, device: torch.device) -> None:
        """Keep the weights in the host's memory; each layer's come to the device for as long as it runs."""
        from accelerate import cpu_offload

        on_host = {id(p): p.detach().cpu() for p in self.weights.values()}  # tied ones once
        self.weights = {name: on_host[id(p)] for name, p in self.weights.items()}
        for buffer in self.model.buffers():  # small, and not offloaded
            buffer.data = buffer.data.to(device)
        cpu_offload(self.model, device, state_dict=self.weights)


class SharedLayers(Reference):
    """A model whose lowest layers are the policy's own modules: frozen, stored once, and run once per micro-batch."""

    def __init__(self, model: "PreTrainedModel", policy: "PreTrainedModel", count: int) -> None:
        training = policy.training
        super().__init__(model)
        policy.train(training)  # eval() has gone through the shared layers
        self.capture_layer = count
        self.upper = UpperLayers(model, count)
        policys = {id(p) for p in policy.parameters()}
        self.own = {name for name, p in model.named_parameters() if id(p) not in policys}

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64, of the upper layers; without captured states of the whole model."""
        if captured is None:
            return super().__call__(batch)
        with torch.no_grad():
            return sequence_logps(self.model, batch, self.upper(captured, **layout_of(batch)), self.ld_alpha)

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """The upper layers, and whatever else of the model holds weights that are not the policy's."""
        policys = {id(p) for p in policy.parameters()}
        found: list[nn.Module] = list(decoder_layers(self.model)[self.capture_layer :])
        inside = {module for layer in (*found, *lowest(policy, self.capture_layer or 0)) for module in layer.modules()}
        for module in self.model.modules():
            held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            own = [tensor for tensor in held if id(tensor) not in policys]
            if own and module not in inside:
                found.append(module)
        return found

    def moving(self) -> dict[str, torch.Tensor]:
        """Weights that `sync` changes: those of the upper layers."""
        return {name: value for name, value in super().moving().items() if name in self.own}


class PolicyStart(Reference):
    """The policy before it has moved: it makes log-probs that are kept, and is the judge no longer afterwards."""

    is_start = True

    def __init__(self, policy: "PreTrainedModel") -> None:
        self.model = policy

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64."""
        training = self.model.training
        self.model.eval()  # without dropout
        try:
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)
        finally:
            self.model.train(training)

    def own_bytes(self, policy: "PreTrainedModel") -> int:
        """None: every weight is the policy's."""
        return 0

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """None, likewise."""
        return []

    def tensors(self) -> dict[str, torch.Tensor]:
        """The base and, where an adapter was loaded to go on from, that one as it was: what the judge consists of."""
        state = self.model.state_dict() | scalings(self.model)
        return {base_name(name): value for name, value in state.items() if not is_of(POLICY, name)}


class AdapterOff(PolicyStart):
    """The policy without its adapter, or with the frozen copy of the one it started from."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__(policy)
        self.layers = list(adapter_layers(policy).values())

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64. Dropout, which would reach it, is off: the settings see to that."""
        with adapter_off(self.layers):
            return sequence_logps(self.model, batch, ld_alpha=self.ld_alpha)


class Absent(Reference):
    """No reference: every log-prob was made before (reference.kind=precomputed)."""

    is_start = True

    def __init__(self) -> None:
        pass

    def own_modules(self, policy: "PreTrainedModel") -> list[nn.Module]:
        """None."""
        return []

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Never returns.

        Raises:
            UserError: a pair has no log-probs: the cache could not be written, or was changed while training.
        """
        raise UserError(
            "reference.kind",
            "precomputed",
            f"the log-probs of pairs {batch.pair_ids.tolist()} are not all in the cache",
            "give the same command again, with room in data.cache_dir",
        )


# --- which it is -------------------------------------------------------------------------------------------------


def identity_of(
    tensors: dict[str, torch.Tensor], config: Any, world: World, types: Mapping[str, torch.dtype] | None = None
) -> dict[str, Any]:
    """What a model's log-probs depend on: its config and the sha256 of its weights, each by one rank. Collective.

    types: of those that an engine is still to cast (see types_when_cut), which are hashed as they will be.
    """
    named = sorted(tensors.items())
    mine: list[str] = []
    for name, tensor in named[world.rank :: world.size]:
        tensor = tensor.to((types or {}).get(name, tensor.dtype))
        content: Any = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        mine.append(hashlib.sha256(content).hexdigest())
    digests = world.gather(mine)
    whole = [(name, digests[i % world.size][i // world.size]) for i, (name, _) in enumerate(named)]
    kept = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    kept = json.loads(json.dumps(kept, sort_keys=True, default=str))
    return {"weights": hashlib.sha256(json.dumps(whole).encode()).hexdigest(), "config": kept}


def check_reference(spec: RunSpec, policy_config: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse another model as reference, before any weight is loaded, whose tokens are not the policy's.

    Raises:
        UserError: its config or tokenizer cannot be loaded, its vocabulary has another size, or its tokenizer another
            token.
    """
    path = spec.reference.path
    if path is None:
        return
    cure = "take a reference with the policy's tokenizer"
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
        rule = f"its tokenizer gives {token!r} the id {others.get(token)}, the policy's {ours[token]}"
        raise UserError("reference.path", path, f"{rule} ({len(different)} tokens differ)", cure)


def _tokenizer_at(path: str) -> Any:
    """The tokenizer beside a model; None where there is none: a folder with weights alone is a reference, too."""
    if os.path.isdir(path) and not any("token" in name or "vocab" in name for name in os.listdir(path)):
        return None  # transformers would make an empty one
    try:
        return tokenizer_at("reference.path", path)
    except UserError:
        if os.path.isdir(path):
            raise
        return None  # the hub says no more than that a file is not there


# --- building one ------------------------------------------------------------------------------------------------


def build_reference(
    spec: RunSpec,
    policy: "PreTrainedModel",
    dtype: torch.dtype,
    ref_model: RefModel | None = None,
    device: torch.device | None = None,
) -> Reference:
    """The reference that the settings, or a Python user's function, ask for.

    policy: as it starts, before any wrapping. dtype: of the run's weights. device: where the reference will run, if
    not where the policy is now; one that is to be sharded stays with the policy until then.

    Raises:
        UserError: the other model cannot be loaded, or cannot be used in this way.
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


def hold(reference: Reference, policy: "PreTrainedModel", device: torch.device, dtype: torch.dtype | None) -> None:
    """Put the weights that are the reference's alone on the device, in a type (None: as they are)."""
    for module in reference.own_modules(policy):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():  # others are the codes of a quantised layer, at their place already
                is_buffer = not isinstance(tensor, nn.Parameter)  # rotary frequencies, exact in any type of weights
                tensor.data = tensor.data.to(device, None if is_buffer else dtype)


def create_reference_model(
    model: "PreTrainedModel", num_shared_layers: int | None = None, pattern: str | None = None
) -> "PreTrainedModel":
    """A frozen copy of a model, as TRL's function of this name; with num_shared_layers, its embeddings and lowest
    layers are not copied: both models have the same modules there, which train no more.

    An output head that is one with the embeddings goes on training in `model`, with weights of its own; the copy's
    stays one with them.

    pattern: the name of a layer's parameters with {layer} for its number ("transformer.h.{layer}"), where the layers
    are not found by themselves.

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
            raise ValueError(f"pattern {pattern!r} names no layers of this model: {error}") from None
    if not 0 <= num_shared_layers < len(layers):
        raise ValueError(f"num_shared_layers = {num_shared_layers}: the model has {len(layers)} layers")
    return _sharing(model, num_shared_layers, keep_head=True, layers=layers)


def _sharing(
    model: "PreTrainedModel",
    count: int,
    keep_head: bool,
    layers: nn.ModuleList | None = None,
    twin: bool = False,
) -> "PreTrainedModel":
    """A frozen copy that shares embeddings and lowest layers; keep_head: see freeze_lowest.

    twin: the weights of its own lie in the model's memory, until an engine cuts both.
    """
    was_tied = freeze_lowest(model, count, keep_head, layers)
    lower = lowest(model, count, layers)
    one: dict[int, Any] = {}
    if twin:
        one = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    one |= {id(x): x for m in lower for x in (m, *m.parameters())}
    if was_tied:
        head: Any = model.get_output_embeddings()
        one[id(head.weight)] = model.get_input_embeddings().weight  # which is what it was until now
    made = copy.deepcopy(model, one)  # deepcopy takes what stands there for copied already
    models = set(model.modules())
    for module in made.modules():
        if module not in models:
            module.training = False
    return made.requires_grad_(False)


def _copy(spec: RunSpec, policy: "PreTrainedModel", dtype: torch.dtype, device: torch.device) -> Reference:
    """A copy of the policy's start or of the model at reference.path, of its own type or quantised."""
    wanted = spec.reference
    full: Any = policy  # what the reference is, or approximates
    if wanted.path is not None:
        full = load_model("reference.path", wanted.path, spec.model.disable_dropout, dtype, mapped=wanted.sharded)
    elif spec.model.lora is not None or wanted.kind not in get_args(Quantized):
        full = _start_of(spec, policy)
    if wanted.kind in get_args(Quantized):
        if full.dtype != dtype:  # its layers answer in their input's type, and autocast mixes no two of 16 bits
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
        made.exact.offload(device)  # there may be no room for it: that is why it is approximated
    return made


def _start_of(spec: RunSpec, policy: "PreTrainedModel") -> Any:
    """A copy of the policy as it starts: of a new adapter nothing is left, one that was loaded stays as it is, or is
    merged where layers are to be quantised."""
    device, lora = policy.device, spec.model.lora
    if spec.reference.offload or spec.reference.is_approximate:
        policy.to("cpu")  # pyright: ignore[reportArgumentType] - two may not fit the device
    start = mapped_twin(policy) if spec.reference.sharded else copy.deepcopy(policy)
    policy.to(device)  # pyright: ignore[reportArgumentType]
    goes_on, is_quantised = lora is not None and lora.adapter_path is not None, spec.reference.kind != "copy"
    if lora is None or (goes_on and not is_quantised):
        return start
    return without_adapter(start, merged=goes_on)


def _let_move(reference: Reference, policy: "PreTrainedModel") -> None:
    """Prepare for `sync`.

    Raises:
        UserError: the weights of the two do not correspond.
    """
    theirs = dict(policy.named_parameters(remove_duplicate=False))
    reference.moves = True
    head, embeddings = reference.model.get_output_embeddings(), reference.model.get_input_embeddings()
    assert head is not None
    policys_head: Any = policy.get_output_embeddings()
    if head.weight is embeddings.weight and policys_head.weight is not policy.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # the policy's was untied
        name = next(n for n, m in reference.model.named_modules() if m is head)
        reference.weights[f"{name}.weight"] = head.weight
        if isinstance(reference, SharedLayers):
            reference.own.add(f"{name}.weight")
    for name, value in reference.moving().items():
        if name not in theirs or theirs[name].shape != value.shape:
            there = tuple(theirs[name].shape) if name in theirs else "no such weight"
            rule = f"{name} of the reference has shape {tuple(value.shape)}, the policy {there}"
            cure = "remove it, or take a reference of the policy's architecture"
            raise UserError("reference.sync_every", "set", rule, cure)


@torch.no_grad()
def _check_upper(reference: SharedLayers, policy: "PreTrainedModel") -> None:
    """Ask the model itself whether its upper layers can be run alone.

    Raises:
        UserError: they give other hidden states than the whole.
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
            f"the upper layers of a {type(policy).__name__} cannot be run alone (they differ by {error:.1e})",
            "set reference.kind=copy and model.num_frozen_layers",
        )


# --- a Python user's own -----------------------------------------------------------------------------------------


def check_function(ref_model: RefModel | None) -> None:
    """Refuse a model where a function that makes one is wanted.

    Raises:
        UserError: it would have to travel to every rank.
    """
    if isinstance(ref_model, nn.Module) or not (ref_model is None or callable(ref_model)):
        rule = "is no function, and a model would have to travel to every rank"
        cure = "put what makes it behind lambda policy: ..., as in lambda policy: create_reference_model(policy, 6)"
        raise UserError("ref_model", type(ref_model).__name__, rule, cure)


def _of_function(spec: RunSpec, policy: "PreTrainedModel", ref_model: RefModel, device: torch.device) -> Reference:
    """What the function returns; where its lowest layers are stored where the policy's are, they are also run once.

    Raises:
        UserError: it returned no causal LM with the policy's vocabulary, or one that would train with the policy.
    """
    key, name = "ref_model", getattr(ref_model, "__name__", type(ref_model).__name__)
    wanted = spec.reference
    if wanted.kind != "copy" or wanted.path is not None or wanted.dtype is not None:
        rule = "the settings say what the reference is, too"
        raise UserError(key, name, rule, "remove reference.kind, reference.path and reference.dtype")
    model: Any = ref_model(policy)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of peft's wrapper, with the adapter inside
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        cure = "for example ref_model=lambda policy: AutoModelForCausalLM.from_pretrained(...)"
        raise UserError(key, name, f"returned a {type(model).__name__}", f"return a causal LM, {cure}")
    sizes = [config.get_text_config().vocab_size for config in (policy.config, model.config)]
    if sizes[0] != sizes[1]:
        rule = f"returned a model with a vocabulary of {sizes[1]} tokens, the policy has {sizes[0]}"
        raise UserError(key, name, rule, "take a reference with the policy's tokenizer")
    check_head(model)
    trained = {p.data_ptr(): n for n, p in policy.named_parameters() if p.requires_grad}
    both = [trained[p.data_ptr()] for p in model.parameters() if p.data_ptr() in trained]
    if both:
        rule = f"returned a model that holds the policy's {both[0]}, which trains"
        raise UserError(key, name, rule, "return a copy, for example by create_reference_model(policy, 6)")
    count = _layers_in_common(policy, model)
    if count is not None and not spec.model.disable_dropout:
        rule = "the policy's dropout would reach the reference through the layers that ref_model shares"
        raise UserError("model.disable_dropout", False, rule, "set it to true, or share none")
    held = "shares layers with the policy" if count is not None else "is in 8 or 4 bits"
    if wanted.offload and (count is not None or is_quantized(model)):
        raise UserError("reference.offload", True, f"what ref_model returned {held}", "remove it")
    if wanted.sync_every and is_quantized(model):
        rule = "what ref_model returned is in 8 or 4 bits, which cannot move by small steps"
        raise UserError("reference.sync_every", wanted.sync_every, rule, "remove it")
    if count is not None:
        made = SharedLayers(_with_the_policys(model, policy, count), policy, count)
        _check_upper(made, policy)
    else:
        stays = wanted.offload or wanted.sharded or model.device == device  # one in 4 bits cannot move at all
        made = Reference(model if stays else model.to(device))
    made.is_start = _equal(policy, made)
    return made


def _layers_in_common(policy: "PreTrainedModel", model: "PreTrainedModel") -> int | None:
    """How many of the lowest layers are stored where the policy's are; None where not even the embeddings are."""

    def is_one(ours: nn.Module, theirs: nn.Module) -> bool:
        return [p.data_ptr() for p in ours.parameters()] == [p.data_ptr() for p in theirs.parameters()]

    if not is_one(policy.get_input_embeddings(), model.get_input_embeddings()):
        return None
    for number, (ours, theirs) in enumerate(zip(decoder_layers(policy), decoder_layers(model), strict=False)):
        if not is_one(ours, theirs):
            return number
    return None  # every layer: nothing is left to run alone


def _with_the_policys(model: "PreTrainedModel", policy: "PreTrainedModel", count: int) -> "PreTrainedModel":
    """The model with the policy's own modules where it has their storage: only so they stay one when moved or cast."""
    ours = {id(m) for m in lowest(policy, count)}
    for name, module in policy.named_modules():
        if id(module) in ours:
            model.set_submodule(name, module)
    return model


def _equal(policy: "PreTrainedModel", reference: Reference) -> bool:
    """Whether the reference is, weight for weight, the policy as it stands."""
    ours, theirs = policy.state_dict(), reference.tensors()
    if ours.keys() != theirs.keys():
        return False
    return all(
        ours[name].dtype == value.dtype and ours[name].shape == value.shape and torch.equal(ours[name], value)
        for name, value in theirs.items()
    )
