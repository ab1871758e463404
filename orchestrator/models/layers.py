"""Find the decoder layers of a model, freeze the lowest, and run the upper ones separately.

Legend: R rows, T tokens, H hidden size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orchestrator.settings.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def body_of(model: "PreTrainedModel") -> Any:
    """Return the part of a causal LM whose forward returns the last hidden states: all but its
    head.

    Raises:
        UserError: the model has no such part.
    """
    if model.base_model is not model:
        return model.base_model
    # Llama 4 has no attribute of the name in its base_model_prefix
    embeddings = model.get_input_embeddings()
    for child in model.children():
        if child is not embeddings and any(module is embeddings for module in child.modules()):
            return child
    cure = "use a Llama, Qwen, Mistral, Gemma or GPT-2 style model"
    raise UserError(
        "model",
        type(model).__name__,
        "has no module that returns hidden states without logits",
        cure,
    )


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """Return the decoder layers of a model, in order.

    Raises:
        UserError: the model has no list of as many layers as num_hidden_layers in its config.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    text: nn.Module = model.get_decoder()  # a vision tower may have as many layers
    for module in text.modules():  # parents come first: the experts of a layer are lists too
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    cure = "use a Llama, Qwen, Mistral, Gemma or GPT-2 style model"
    raise UserError("model", type(model).__name__, f"has no list of {count} layers", cure)


def lowest(
    model: "PreTrainedModel", count: int, layers: nn.ModuleList | None = None
) -> list[nn.Module]:
    """Return the modules that run before layer `count`: the embeddings, modules registered beside
    them, and layers.
    """
    layers = decoder_layers(model) if layers is None else layers
    before: list[nn.Module] = []
    for module in model.modules():
        if module is layers:
            break
        if next(module.parameters(recurse=False), None) is not None:
            before.append(module)
    return before + list(layers[:count])


def head_is_tied(model: "PreTrainedModel") -> bool:
    """Return whether the output head and the embeddings are tied to one weight."""
    head: Any = model.get_output_embeddings()
    return getattr(head, "weight", None) is model.get_input_embeddings().weight


def freeze_lowest(
    model: "PreTrainedModel",
    count: int,
    keep_head: bool = True,
    layers: nn.ModuleList | None = None,
) -> bool:
    """Freeze the embeddings and the first `count` layers; return whether the output head was tied
    to the embeddings.

    keep_head: untie such a head, so that it has its own, trainable weights.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(head, nn.Linear) and head.weight is embeddings.weight
    if tied and keep_head:
        assert isinstance(head, nn.Linear)
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = (
                False  # otherwise loading or saving the model would tie them again
            )
    for module in lowest(model, count, layers):
        module.requires_grad_(False)
    return tied


@contextmanager
def captured_at(model: "PreTrainedModel", layer: int | None) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which each forward pass of the model appends the hidden states [R, T, H] that
    enter a layer.

    They have no gradient, and recomputation by gradient checkpointing appends nothing. layer: None
    captures nothing.
    """
    captured: list[torch.Tensor] = []
    if layer is None:
        yield captured
        return

    def keep(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        captured.append((args[0] if args else options["hidden_states"]).detach())

    handle = decoder_layers(model)[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield captured
    finally:
        handle.remove()


class _Passed(nn.Module):
    """Stand-in for a lower layer that returns its input, because its work is done already."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not registered: its parameters do not belong to this stack

    def __getattr__(self, name: str) -> Any:
        # attributes that a model reads, such as attention_type
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class UpperLayers:
    """The layers of a model from `first` on and all that follows them, run on captured hidden
    states.

    The model's own forward runs, with its masks, position embeddings and norms, over a stack in
    which the lower layers return their input.
    """

    def __init__(self, model: "PreTrainedModel", first: int) -> None:
        layers = decoder_layers(model)
        self.entered = layers[first]
        self.body = _with_layers(
            body_of(model), layers, nn.ModuleList([_Passed(x) for x in layers[:first]])
        )

    def __call__(self, captured: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return the last hidden states [R, T, H].

        captured: [R, T, H], the input of layer `first`. options: keyword arguments of the body's
        forward.
        """

        def enter(
            _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # the body may have added position embeddings to its input by now
            if args:
                return (captured, *args[1:]), keywords
            return (), {**keywords, "hidden_states": captured}

        handle = self.entered.register_forward_pre_hook(enter, with_kwargs=True)
        try:
            return self.body(inputs_embeds=captured, use_cache=False, **options).last_hidden_state
        finally:
            handle.remove()


def _with_layers(module: nn.Module, layers: nn.ModuleList, lower: nn.ModuleList) -> nn.Module:
    """Return a module that shares everything with this one except its lowest layers."""
    if module is layers:
        return nn.ModuleList([*lower, *layers[len(lower) :]])
    if not any(child is layers for child in module.modules()):
        return module
    other = copy.copy(module)
    other._modules = {
        name: child and _with_layers(child, layers, lower)
        for name, child in module._modules.items()
    }
    return other
