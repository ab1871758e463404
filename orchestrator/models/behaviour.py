"""Ask a model by small forward passes what no config says: noise, causality, padding, weights without a gradient."""

from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.models.layers import body_of
from orchestrator.settings.spec import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 32  # of a probe
DRAWS = 3  # forward passes that must agree where random numbers are drawn
# Parts of the names of settings by which a model is noisy while it trains, and which it does not read otherwise (PhiMoE
# does read router_jitter_noise: modules with such noise are kept in evaluation mode).
NOISE = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob", "drop_rate", "stochastic_depth")


def silence(config: "PretrainedConfig") -> None:
    """Set to zero every rate in a config, and in the configs inside it, that makes a model noisy while it trains."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "get_text_config"):
            silence(value)
        elif isinstance(value, float) and any(part in name for part in NOISE):
            setattr(config, name, 0.0)


def still_noise(model: "PreTrainedModel") -> list[str]:
    """Keep in evaluation mode, for good, the modules that draw random numbers while training; return their names.

    Raises:
        UserError: one of them is noisy in evaluation mode too, or its weights would have no gradient there.
    """
    kept: list[str] = []
    reached = None
    drawing = _drawing(model)
    while training := [module for module in drawing if module.training]:
        reached = reached or _reached(model)
        names = {module: name for name, module in model.named_modules()}
        for module in training:
            _keep_in_evaluation(module)
        if _reached(model) < reached:
            raise _noise_stays(names[training[0]])
        kept += [names[module] for module in training]
        drawing = _drawing(model)
    if drawing and not _repeats(model):
        raise _noise_stays(next(name for name, module in model.named_modules() if module is drawing[0]))
    return kept


def _noise_stays(module: str) -> UserError:
    rule = f"{module} draws random numbers while training, and nothing switches that off"
    return UserError("model.disable_dropout", True, rule, "set model.disable_dropout=false to train with noise")


def check_causal(model: "PreTrainedModel", logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse a model whose logits depend on later tokens: an encoder, or attention in both directions.

    logits: ids [R, T] -> [R, T, V].

    Raises:
        UserError: they do.
    """
    ids = _ids(model, 6).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    first, second = logits(ids)[:, :-1].double()
    rounding = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-5
    if (first - second).abs().max() > rounding * first.abs().max():
        rule = "the logits of a token depend on later tokens: it is not a causal LM as it is configured"
        raise UserError("model", type(model).__name__, rule, "take a decoder (of an encoder type: is_decoder=true)")


def depends_on_gradients(model: "PreTrainedModel") -> bool:
    """Return whether the logits differ with and without gradients: torch takes another attention kernel where a mask is
    computed from weights (Inkling's bias), and a policy would then differ from its own reference by rounding."""
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(input_ids=_ids(model, TOKENS), use_cache=False).logits.detach()
        _detach_states(model)
        with torch.no_grad():
            return not torch.equal(logits, model(input_ids=_ids(model, TOKENS), use_cache=False).logits)
    finally:
        model.train(training)


@torch.no_grad()
def padding_error(model: "PreTrainedModel", device: torch.device) -> float:
    """Return how far the hidden states of a sequence in a padded batch are from those it has alone, relative to the
    largest of them."""
    training, body = model.training, body_of(model)
    model.eval()
    ids = _ids(model, 9).to(device).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, 5:], mask[0, 5:] = 0, 0
    try:
        padded = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, :5]
        alone = body(input_ids=ids[:1, :5], attention_mask=mask[:1, :5], use_cache=False).last_hidden_state[0]
    finally:
        model.train(training)
    return ((padded - alone).abs().amax() / alone.abs().amax()).item()


def freeze_unreached(model: "PreTrainedModel", ranks: int) -> list[str]:
    """Freeze the trainable parameters that no row of text gives a gradient, such as a vision tower's; return their
    names. One that other tokens may reach (of one expert among several) is left as it is on one rank; several ranks
    would sum the gradients of different weights.

    Raises:
        UserError: there are several ranks, and such weights.
    """
    reached = _reached(model)
    routed = _routed(model, reached)
    if routed and ranks > 1:
        rule = "some of its experts have no gradient on a rank whose tokens are not routed to them"
        raise UserError("model", type(model).__name__, rule, "train it on one rank")
    trained = reached | routed
    frozen = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
    for _, p in frozen:
        p.requires_grad_(False)
    return [name for name, _ in frozen]


# --- small forward passes ----------------------------------------------------------------------------------------


def _ids(model: "PreTrainedModel", tokens: int) -> torch.Tensor:
    """[1, tokens] ids, all different where the vocabulary allows it; not those at its ends, which are often special."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(tokens) * max(1, vocabulary // (2 * tokens)) + vocabulary // 4
    return (ids % vocabulary)[None].to(model.device)


def _forward(model: "PreTrainedModel") -> torch.Tensor:
    """The logits of a probe, as in training: [1, T, V]."""
    training = model.training
    model.train()
    try:
        return model(input_ids=_ids(model, TOKENS), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError) as error:  # Reformer trains on sequences of one length only
        rule = f"its forward pass fails while training ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        raise UserError("model", type(model).__name__, rule, "take another model") from None
    finally:
        model.train(training)


@contextmanager
def _forked_random(device: torch.device, seed: int) -> Any:
    """Random numbers of a seed; afterwards the state is as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _state(device: torch.device) -> bytes:
    on_gpu = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes() + on_gpu


@torch.no_grad()
def _drawing(model: "PreTrainedModel") -> list[nn.Module]:
    """The innermost modules that draw random numbers while training."""
    drawing = _Drawing(model.device)
    with _forked_random(model.device, 0), drawing.watched(model):
        _forward(model)
    return drawing.modules


@torch.no_grad()
def _repeats(model: "PreTrainedModel") -> bool:
    """Return whether the logits are the same for other random numbers."""
    outputs: list[torch.Tensor] = []
    for seed in range(DRAWS):
        with _forked_random(model.device, seed):
            outputs.append(_forward(model))
    return all(torch.equal(output, outputs[0]) for output in outputs)


class _Drawing:
    """Hooks that notice which module draws random numbers, inside all others that contain it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.modules: list[nn.Module] = []
        self.entered: list[bytes] = []
        self.found_inside: list[bool] = [False]

    @contextmanager
    def watched(self, model: nn.Module) -> Any:
        handles = [module.register_forward_pre_hook(self.enter) for module in model.modules()]
        handles += [module.register_forward_hook(self.leave) for module in model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, *_: Any) -> None:
        self.entered.append(_state(self.device))
        self.found_inside.append(False)

    def leave(self, module: nn.Module, *_: Any) -> None:
        draws = _state(self.device) != self.entered.pop()
        inside = self.found_inside.pop()
        if draws and not inside and module not in self.modules:
            self.modules.append(module)
        self.found_inside[-1] = self.found_inside[-1] or draws


def _keep_in_evaluation(module: nn.Module) -> None:
    module.training = False
    module.train = MethodType(_train_children, module)


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    for child in module.children():
        child.train(mode)
    return module


def _reached(model: "PreTrainedModel") -> set[int]:
    """The ids of the parameters that a backward pass would reach: the graph of a forward pass is walked, no gradient
    is computed."""
    with _forked_random(model.device, 0), torch.enable_grad():
        waiting: list[Any] = [_forward(model).grad_fn]
    _detach_states(model)
    seen: set[Any] = set()
    reached: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return reached


def _detach_states(model: nn.Module) -> None:
    """Cut what a recurrent model keeps of its last input from the graph: a module that holds such a tensor cannot be
    copied."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _routed(model: "PreTrainedModel", reached: set[int]) -> set[int]:
    """The ids of the trainable parameters of modules in a list that were not reached at all, while one of the same type
    beside them was: experts to which no token of the probe was routed."""
    routed: set[int] = set()
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList):
            of_each = [(type(m), {id(p) for p in m.parameters() if p.requires_grad}) for m in modules]
            kinds = {kind for kind, parameters in of_each if parameters & reached}
            routed |= {
                p for kind, parameters in of_each if kind in kinds and not parameters & reached for p in parameters
            }
    return routed
