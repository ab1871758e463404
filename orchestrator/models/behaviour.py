"""Find out by small forward passes what a config does not say: noise, causality, weights without
gradient.
"""

from collections.abc import Callable
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.settings.errors import UserError, type_and_message

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENS = 32  # length of the input of a probe
DRAWS = 3  # forward passes with different random numbers that must agree
# Parts of the names of config keys that only make a model noisy in training. PhiMoE also reads
# router_jitter_noise elsewhere, so it is not listed: modules with such noise are kept in evaluation
# mode.
NOISE = ("dropout", "pdrop", "layerdrop", "drop_path", "drop_prob", "drop_rate", "stochastic_depth")


def silence(config: "PretrainedConfig") -> None:
    """Set every rate that makes a model noisy in training to zero, in a config and in the configs
    nested in it.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "get_text_config"):
            silence(value)
        elif isinstance(value, float) and any(part in name for part in NOISE):
            setattr(config, name, 0.0)


def still_noise(model: "PreTrainedModel") -> list[str]:
    """Keep the modules that draw random numbers in training in evaluation mode permanently; return
    their names.

    Raises:
        UserError: one of them is noisy in evaluation mode too, or its weights would have no
            gradient there.
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
        raise _noise_stays(
            next(name for name, module in model.named_modules() if module is drawing[0])
        )
    return kept


def _noise_stays(module: str) -> UserError:
    rule = f"{module} draws random numbers in training, which cannot be switched off"
    return UserError(
        "model.disable_dropout", True, rule, "set model.disable_dropout=false to train with noise"
    )


def check_causal(model: "PreTrainedModel", logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Check that no logit depends on later tokens, as in an encoder or with bidirectional
    attention.

    logits: ids [R, T] -> [R, T, V].

    Raises:
        UserError: the model is not causal.
    """
    ids = probe_ids(model, 6).repeat(2, 1)
    ids[1, -1] = ids[0, 0]
    first, second = logits(ids)[:, :-1].double()
    rounding = 2e-2 if model.dtype in (torch.bfloat16, torch.float16) else 1e-5
    if (first - second).abs().max() > rounding * first.abs().max():
        rule = "the logits of a token depend on later tokens: with its config it is not a causal LM"
        raise UserError(
            "model",
            type(model).__name__,
            rule,
            "use a decoder (for an encoder type: is_decoder=true)",
        )


def depends_on_gradients(model: "PreTrainedModel") -> bool:
    """Return whether the logits differ with and without gradients.

    torch uses another attention kernel where a mask is computed from weights (Inkling's bias), and
    a policy would then differ from its own reference by rounding.
    """
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(input_ids=probe_ids(model, TOKENS), use_cache=False).logits.detach()
        _detach_states(model)
        with torch.no_grad():
            return not torch.equal(
                logits, model(input_ids=probe_ids(model, TOKENS), use_cache=False).logits
            )
    finally:
        model.train(training)


def freeze_unreached(model: "PreTrainedModel", ranks: int) -> list[str]:
    """Freeze the trainable parameters that get no gradient from text, such as a vision tower's;
    return their names.

    Parameters that other tokens may reach (of one expert among several) stay trainable on one rank.
    On several ranks they are an error: gradients of different weights would be summed.

    Raises:
        UserError: there are several ranks, and such experts.
    """
    reached = _reached(model)
    routed = _routed(model, reached)
    if routed and ranks > 1:
        rule = "an expert has no gradient on a rank that routes no token to it"
        raise UserError("model", type(model).__name__, rule, "train it on one rank")
    trained = reached | routed
    frozen = [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in trained
    ]
    for _, p in frozen:
        p.requires_grad_(False)
    return [name for name, _ in frozen]


# --- small forward passes -------------------------------------------------------------------------


def probe_ids(model: "PreTrainedModel", tokens: int) -> torch.Tensor:
    """Return ids [1, tokens], all different if the vocabulary is large enough; special tokens are
    often at its ends, which are avoided.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(tokens) * max(1, vocabulary // (2 * tokens)) + vocabulary // 4
    return (ids % vocabulary)[None].to(model.device)


def _forward(model: "PreTrainedModel") -> torch.Tensor:
    """Return the logits [1, T, V] of a probe in training mode."""
    training = model.training
    model.train()
    try:
        return model(input_ids=probe_ids(model, TOKENS), use_cache=False).logits
    # Reformer trains on sequences of one length only
    except (RuntimeError, ValueError, TypeError) as error:
        rule = f"its forward pass fails in training ({type_and_message(error)})"
        raise UserError("model", type(model).__name__, rule, "use another model") from None
    finally:
        model.train(training)


@contextmanager
def _forked_random(device: torch.device, seed: int) -> Any:
    """Seed the random numbers, and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _state(device: torch.device) -> bytes:
    on_gpu = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes() + on_gpu


@torch.no_grad()
def _drawing(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the innermost modules that draw random numbers in training."""
    drawing = _Drawing(model.device)
    with _forked_random(model.device, 0), drawing.watched(model):
        _forward(model)
    return drawing.modules


@torch.no_grad()
def _repeats(model: "PreTrainedModel") -> bool:
    """Return whether the logits stay the same with other random numbers."""
    outputs: list[torch.Tensor] = []
    for seed in range(DRAWS):
        with _forked_random(model.device, seed):
            outputs.append(_forward(model))
    return all(torch.equal(output, outputs[0]) for output in outputs)


class _Drawing:
    """Hooks that find the innermost modules that draw random numbers."""

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
    """Return the ids of the parameters that a backward pass would reach, from the graph of a
    forward pass; no gradient is computed.
    """
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
    """Detach the states that a recurrent model keeps of its last input: a module that holds a
    tensor with a graph cannot be copied.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def _routed(model: "PreTrainedModel", reached: set[int]) -> set[int]:
    """Return the ids of the trainable parameters of experts to which no token of the probe was
    routed: modules of a list that were not reached at all, while one of the same type in that list
    was.
    """
    routed: set[int] = set()
    for modules in model.modules():
        if isinstance(modules, nn.ModuleList):
            of_each = [
                (type(m), {id(p) for p in m.parameters() if p.requires_grad}) for m in modules
            ]
            kinds = {kind for kind, parameters in of_each if parameters & reached}
            routed |= {
                p
                for kind, parameters in of_each
                if kind in kinds and not parameters & reached
                for p in parameters
            }
    return routed
