"""Measure, by small forward passes, how far a layout of rows changes hidden states: packing, and
padding.
"""

import math
from typing import TYPE_CHECKING

import torch

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator
from orchestrator.models.behaviour import probe_ids
from orchestrator.models.head import scored_hidden
from orchestrator.models.layers import body_of
from orchestrator.models.logps import body_hidden
from orchestrator.settings.data import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def packed_error(model: "PreTrainedModel", device: torch.device) -> float:
    """Return how far packed hidden states are from padded ones on one small pair, relative to the
    largest of them.

    If packing is exact, this is rounding. It is large with a release of transformers that drops our
    layout keyword, and infinite if the model cannot run without it.
    """
    training = model.training
    model.eval()  # dropout would differ between the two passes
    packed, padded = small_batches(device)
    expected = scored_hidden(body_hidden(model, padded), padded)
    try:
        output = scored_hidden(body_hidden(model, packed), packed)
    except (RuntimeError, TypeError, ValueError):
        return math.inf
    finally:
        model.train(training)
    return ((output - expected).abs().amax() / expected.abs().amax()).item()


@torch.no_grad()
def padding_error(model: "PreTrainedModel", device: torch.device) -> float:
    """Return how far the hidden states of a sequence in a padded batch are from those in a batch of
    one, relative to the largest of them.
    """
    training, body = model.training, body_of(model)
    model.eval()
    ids = probe_ids(model, 9).to(device).repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[0, 5:], mask[0, 5:] = 0, 0
    try:
        padded = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, :5]
        alone = body(
            input_ids=ids[:1, :5], attention_mask=mask[:1, :5], use_cache=False
        ).last_hidden_state[0]
    finally:
        model.train(training)
    return ((padded - alone).abs().amax() / alone.abs().amax()).item()


def small_batches(device: torch.device) -> tuple[PairBatch, PairBatch]:
    """Return one pair of a few tokens as a packed and a padded batch, to probe a model."""
    row = {
        "pair_id": 0,
        "prompt_ids": [3, 1, 2, 0],
        "chosen_ids": [1, 4, 2],
        "rejected_ids": [5, 3, 4, 1],
    }
    data = DataSpec(train="")  # pyright: ignore[reportCallIssue]
    return PackedCollator(data)([row]).to(device), PreferenceCollator(0, data)([row]).to(device)
