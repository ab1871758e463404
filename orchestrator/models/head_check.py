"""Check that a model is causal, and that `Head` reproduces its logits from its hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from orchestrator.models.attention import CHECKED
from orchestrator.models.behaviour import check_causal, depends_on_gradients
from orchestrator.models.head import Head
from orchestrator.models.layers import body_of
from orchestrator.settings.errors import UserError, type_and_message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Errors of a forward pass with sizes that do not fit each other.
CANNOT_RUN = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    ImportError,
)


def check_head(model: "PreTrainedModel") -> None:
    """Check that a model is causal, and that Head reproduces its logits: the step runs body and
    head separately.

    A model whose logits depend on whether gradients are computed is switched to transformers' eager
    attention.

    Raises:
        UserError: it is not causal, its own logits differ from Head's, or its forward pass fails.
    """
    try:
        compare_with_head(model)
    except CANNOT_RUN as error:
        reason = type_and_message(error)
        cure = "check the sizes in its config.json, or use another model"
        raise UserError(
            "model", type(model).__name__, f"its forward pass fails ({reason})", cure
        ) from None


@torch.no_grad()
def compare_with_head(model: "PreTrainedModel") -> None:
    """Run `check_head`, but raise the errors of a forward pass (CANNOT_RUN) as they are."""
    if model.config.get_text_config().model_type not in CHECKED and depends_on_gradients(model):
        model.set_attn_implementation("eager")
    training, head = model.training, Head.of(model)
    model.eval()
    ids = torch.tensor([[0, 1]])
    with _at_least_fp32(head.module):
        check_causal(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
        whole = model(input_ids=ids, use_cache=False).logits
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        apart = head(hidden)
    model.train(training)
    if whole.shape != apart.shape or not torch.allclose(
        whole.to(apart.dtype), apart, rtol=1e-4, atol=1e-4
    ):
        rule = (
            "changes its logits after the head in a way that is not supported "
            f"({_difference(whole, apart)})"
        )
        cure = "use a Llama, Qwen, Mistral, Gemma or GPT-2 style model"
        raise UserError("model", type(model).__name__, rule, cure)


def _difference(whole: torch.Tensor, apart: torch.Tensor) -> str:
    """Describe how a model's own logits differ from those of its head."""
    if whole.shape != apart.shape:
        return f"{whole.shape[-1]} logits, but its head returns {apart.shape[-1]}"
    whole, apart = whole.double(), apart.double()
    factor = ((whole * apart).sum() / (apart * apart).sum()).item()
    if torch.allclose(whole, factor * apart, rtol=1e-3, atol=1e-4):
        return f"they are multiplied by {factor:.4g}"
    return (
        f"they differ by {(whole - apart).abs().max().item():.2g}, the largest is "
        f"{whole.abs().max().item():.2g}"
    )


@contextmanager
def _at_least_fp32(head: torch.nn.Module) -> Iterator[None]:
    """Keep the head's output in fp32 within the context, so that what a model does to it differs
    from rounding.
    """
    handle = head.register_forward_hook(
        lambda _, __, logits: logits.to(torch.promote_types(logits.dtype, torch.float))
    )
    try:
        yield
    finally:
        handle.remove()
