"""Compute the log-probs of the sequences of a batch: body, then head.

Legend: 2B sequences, R rows of the batch, T tokens of a row, H hidden size.
"""

from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.models.attention import packed_arguments
from orchestrator.models.head import loss_in_head
from orchestrator.models.layers import body_of
from orchestrator.models.sums import PairSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def body_hidden(model: "PreTrainedModel", batch: PairBatch) -> torch.Tensor:
    """Return the last hidden states [R, T, H], computed without the head."""
    return body_of(model)(
        input_ids=batch.input_ids, use_cache=False, **layout_of(batch)
    ).last_hidden_state


def layout_of(batch: PairBatch) -> dict[str, Any]:
    """Return the keyword arguments of a model's body that define which tokens of the batch attend
    to which.
    """
    if batch.segments is None:
        return {"attention_mask": batch.attention_mask}
    return packed_arguments(batch.segments, batch.input_ids) | {"position_ids": batch.position_ids}


@torch.no_grad()
def sequence_logps(
    model: "PreTrainedModel",
    batch: PairBatch,
    hidden: torch.Tensor | None = None,
    ld_alpha: float | None = None,
) -> torch.Tensor:
    """Return the log-probs [2B] of a whole model in fp64, without gradient; bitwise equal to those
    in its loss.

    hidden: [R, T, H] its last hidden states, if they are known. ld_alpha: see PairSums.logps.
    """

    def no_loss(_: slice, sums: PairSums) -> torch.Tensor:
        return sums.logps.new_zeros(len(sums.logps))

    hidden = body_hidden(model, batch) if hidden is None else hidden
    return loss_in_head(model, hidden, batch, no_loss, with_metrics=False, ld_alpha=ld_alpha).logps
