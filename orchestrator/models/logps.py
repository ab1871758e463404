"""Hidden states at completion positions -> log-prob of each sequence: chunked head, fp64 sums.

Legend: R rows of the batch, T tokens, H hidden size, C completion tokens, 2B sequences, V vocabulary.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.data.collate import PairBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 2**26  # logits alive at once (256 MB in fp32); what needs more chunks is recomputed in the backward pass


class TokenTerms(NamedTuple):
    """What the head says of each completion token, all [C]; all but `logps` without gradient."""

    logps: torch.Tensor
    entropy: torch.Tensor  # nats
    mean_logit: torch.Tensor  # over the vocabulary
    is_top1: torch.Tensor  # 1.0 where the label is the most probable token


def body_hidden(model: "PreTrainedModel", batch: PairBatch) -> torch.Tensor:
    """The last hidden states of the model without its head: [R, T, H]."""
    body = model.base_model
    return body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state


def output_head(model: "PreTrainedModel") -> torch.nn.Module:
    """The module that turns hidden states into logits."""
    head = model.get_output_embeddings()
    assert head is not None  # every causal LM has one
    return head


def token_terms(model: "PreTrainedModel", hidden: torch.Tensor, batch: PairBatch) -> TokenTerms:
    """The head on completion positions only. hidden: [R, T, H]; all results [C].

    Logits of at most CHUNK_LOGITS elements exist at a time, in forward and in backward.
    """
    head = output_head(model)
    selected = hidden.flatten(0, 1)[batch.completion_index]
    labels = batch.completion_labels
    size = max(1, CHUNK_LOGITS // model.config.get_text_config().vocab_size)
    if len(labels) <= size or not torch.is_grad_enabled():
        parts = [_terms(head(h), y) for h, y in zip(selected.split(size), labels.split(size), strict=True)]
    else:
        parts = [_recomputed(head, h, y) for h, y in zip(selected.split(size), labels.split(size), strict=True)]
    return TokenTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))


def sequence_sums(values: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """[C] -> [2B] in fp64: a serial fp32 sum over a long completion costs 1e-4 in the loss."""
    sums = torch.zeros(2 * len(batch.pair_ids), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, batch.completion_sequence, values.double())


def _terms(logits: torch.Tensor, labels: torch.Tensor) -> TokenTerms:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, labels[:, None])[:, 0] - normaliser
    with torch.no_grad():
        entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
        return TokenTerms(logps, entropy, logits.mean(-1), (logits.argmax(-1) == labels).to(logits.dtype))


def _recomputed(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> TokenTerms:
    """`_terms` whose logits are freed and made again in the backward pass."""
    first: list[TokenTerms] = []

    def run(hidden: torch.Tensor) -> torch.Tensor:
        terms = _terms(head(hidden), labels)
        first.append(terms)
        return terms.logps

    logps = checkpoint(run, hidden, use_reentrant=False)
    terms = first.pop()
    return TokenTerms(logps, terms.entropy, terms.mean_logit, terms.is_top1)  # pyright: ignore[reportArgumentType]
