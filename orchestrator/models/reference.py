"""The frozen judge: the model whose log-probs the policy's are measured against.

Legend: 2B sequences, R rows, T tokens, H hidden size.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.models.logps import body_hidden, sequence_sums, token_terms
from orchestrator.models.policy import config_at, load_model
from orchestrator.settings.spec import ModelSpec, ReferenceSpec, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reference:
    """A frozen model of its own. Not an nn.Module on purpose: whoever holds it registers no parameter."""

    capture_layer: int | None = None  # a copy needs no hidden state of the policy

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64. `captured` [R, T, H] is what entered capture_layer in the policy; unused here."""
        return sequence_sums(token_terms(self.model, body_hidden(self.model, batch), batch).logps, batch)


def check_reference(spec: ReferenceSpec, policy_config: Any) -> None:
    """Refuse another model as reference, before any weight is loaded, whose vocabulary is not the policy's.

    Raises:
        UserError: its config cannot be loaded, or its vocabulary has another size.
    """
    if spec.path is None:
        return
    sizes = [c.get_text_config().vocab_size for c in (policy_config, config_at("reference.path", spec.path))]
    if sizes[0] != sizes[1]:
        raise UserError(
            "reference.path",
            spec.path,
            f"has a vocabulary of {sizes[1]} tokens, the policy of {sizes[0]}",
            "take a reference with the policy's tokenizer",
        )


def build_reference(spec: ReferenceSpec, model: ModelSpec, policy: "PreTrainedModel") -> Reference:
    """A frozen copy of the policy as it stands (before any wrapping), or of the model at reference.path.

    Raises:
        UserError: the other model cannot be loaded.
    """
    if spec.path is None:
        return Reference(copy.deepcopy(policy))
    other = load_model("reference.path", spec.path, model.disable_dropout, policy.dtype)
    return Reference(other.to(policy.device))  # pyright: ignore[reportArgumentType]
