"""Loss, log-probs and gradient of the head equal a naive computation, in both layouts and however
it is cut.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from orchestrator.data.collate import PairBatch, PreferenceCollator
from orchestrator.models import plain_head as module
from orchestrator.models.head import Head, Scored, TokenTerms, loss_in_head
from orchestrator.models.logps import body_hidden, sequence_logps
from orchestrator.models.sums import PairSums, sequence_sums
from support.tiny_parts import (
    PAD,
    both_layouts,
    collator,
    data_spec,
    pair_batch,
    pair_rows,
    tiny_model,
)
from support.tiny_settings import TINY_MODEL

VOCABULARY = 300
FP64 = torch.float64


class OtherHead(nn.Linear):
    """Computes the same, but is not known to: its gradient is autograd's."""


both_heads = pytest.mark.parametrize("plain", [True, False], ids=["plain head", "any head"])


def made_model(plain: bool = True, dtype: torch.dtype = FP64, **config: Any) -> Any:
    """A model for both layouts."""
    model: Any = tiny_model(dtype=dtype, packed=True, **config)
    if not plain:
        model.lm_head.__class__ = OtherHead
    assert Head.of(model).is_plain is plain
    return model


def pair_losses(pairs: slice, sums: PairSums) -> torch.Tensor:
    """A loss of both log-probs that is not linear and differs for every pair."""
    chosen, rejected = sums.logps.unbind(1)
    weights = torch.linspace(0.2, 1.3, 100, dtype=FP64)[pairs][: len(chosen)]
    return weights * softplus(1.1 * rejected - 0.9 * chosen + 3)


def scored(model: Any, batch: PairBatch, with_metrics: bool = True) -> Scored:
    return loss_in_head(model, body_hidden(model, batch), batch, pair_losses, with_metrics)


def naive(model: Any, rows: list[dict[str, Any]]) -> Scored:
    """The same from the whole model's logits, one sequence at a time."""
    values: list[TokenTerms] = []
    sums: list[torch.Tensor] = []
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            begin = len(row["prompt_ids"])
            ids = torch.tensor(row["prompt_ids"] + row[side])
            logits = model(input_ids=ids[None]).logits[0, begin - 1 : -1]
            log_probs = logits.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            values.append(
                TokenTerms(entropy, logits.mean(-1), (logits.argmax(-1) == ids[begin:]).double())
            )
            sums.append(log_probs.gather(1, ids[begin:, None]).sum(dtype=FP64))
    by_pair = torch.stack(sums).view(-1, 2)
    loss = pair_losses(slice(0, len(rows)), PairSums(by_pair, by_pair[:, 0], None)).sum()
    tokens = TokenTerms(*(torch.cat(column).detach() for column in zip(*values, strict=True)))
    return Scored(loss, PairSums(by_pair.detach(), by_pair[:, 0].detach(), None), tokens)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10
) -> None:
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=tolerance, atol=tolerance * largest), name


def assert_same_terms(actual: Scored, expected: Scored, tolerance: float = 1e-12) -> None:
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    assert torch.allclose(actual.logps, expected.logps, rtol=tolerance)
    assert actual.tokens is not None
    assert expected.tokens is not None
    for name, ours, theirs in zip(TokenTerms._fields, actual.tokens, expected.tokens, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=0, atol=tolerance), name


@both_layouts
@both_heads
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_terms_and_gradient_equal_a_naive_computation(
    packed: bool, plain: bool, tied: bool
) -> None:
    model = made_model(plain, tie_word_embeddings=tied)
    actual, expected = scored(model, pair_batch(5, packed=packed)), naive(model, pair_rows(5))
    assert_same_terms(actual, expected)
    grads = gradients(model, expected.loss)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert_close(gradients(model, actual.loss), grads)


@both_heads
def test_the_most_probable_token_is_found(plain: bool) -> None:
    model, batch = made_model(plain), pair_batch(3)
    actual = scored(model, batch).tokens
    assert actual is not None
    assert actual.is_top1.mean() < 0.5
    best = model.lm_head(body_hidden(model, batch).flatten(0, 1)[batch.completion_index]).argmax(-1)
    actual = scored(model, batch._replace(completion_labels=best)).tokens
    assert actual is not None
    assert actual.is_top1.tolist() == [1.0] * len(best)


@both_heads
def test_only_the_loss_carries_a_gradient(plain: bool) -> None:
    loss, sums, tokens = scored(made_model(plain), pair_batch(3))
    assert loss.requires_grad
    assert tokens is not None
    assert not any(tensor.requires_grad for tensor in (sums.logps, sums.chosen, *tokens))


@both_layouts
@both_heads
@pytest.mark.parametrize("rows", [1, 3, 7, 11])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_chunks_change_neither_value_nor_gradient(
    monkeypatch: pytest.MonkeyPatch, packed: bool, plain: bool, rows: int, tied: bool
) -> None:
    model, batch = made_model(plain, tie_word_embeddings=tied), pair_batch(5, packed=packed)
    whole = scored(model, batch)
    whole_grads = gradients(model, whole.loss)
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows * VOCABULARY)
    chunked = scored(model, batch)
    assert_same_terms(chunked, whole, 1e-13)
    assert_close(gradients(model, chunked.loss), whole_grads)


@both_layouts
def test_log_probs_do_not_depend_on_other_pairs_or_padding(packed: bool) -> None:
    model, rows = made_model(), pair_rows(4)
    together = sequence_logps(model, collator(packed)(rows)).view(2, 4)
    for index, row in enumerate(rows):
        alone = sequence_logps(model, collator(packed)([row]))
        assert torch.allclose(together[:, index], alone, rtol=0, atol=1e-12)


@both_layouts
@both_heads
def test_a_batch_without_scored_tokens_has_zero_log_probs(packed: bool, plain: bool) -> None:
    model = made_model(plain)
    batch = collator(packed)(
        [{"pair_id": 1, "prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}]
    )
    actual = scored(model, batch)
    assert actual.tokens is not None
    assert [len(column) for column in actual.tokens] == [0, 0, 0]
    assert actual.logps.tolist() == [0.0, 0.0]
    assert all(not grad.any() for grad in gradients(model, actual.loss).values())


@both_layouts
def test_log_probs_alone_are_to_the_last_bit_those_of_the_loss(packed: bool) -> None:
    model, batch = made_model(dtype=torch.float32), pair_batch(6, packed=packed)
    actual = sequence_logps(model, batch)
    assert actual.dtype == FP64
    assert not actual.requires_grad
    assert torch.equal(actual, scored(model, batch).logps)


def test_sums_are_fp64_and_stand_chosen_first() -> None:
    batch = pair_batch(2)
    values = (
        torch.rand(len(batch.completion_labels), generator=torch.Generator().manual_seed(0)) * 1e4
        + 0.1
    )
    sums = sequence_sums(values, batch)
    assert sums.dtype == FP64
    parts = [math.fsum(part.tolist()) for part in values.split(list(batch.scored))]
    assert sums.tolist() == pytest.approx([parts[0], parts[2], parts[1], parts[3]], rel=1e-15)
    assert torch.equal(
        sequence_sums(torch.stack([values, 2 * values]), batch), torch.stack([sums, 2 * sums])
    )


@both_heads
def test_half_precision_logits_are_normalised_in_fp32(plain: bool) -> None:
    """In pairs of one token a side, so that a log-prob is a token's."""
    model: Any = made_model(plain, dtype=torch.bfloat16)
    rows = [
        {**row, "chosen_ids": row["chosen_ids"][:1], "rejected_ids": row["rejected_ids"][:1]}
        for row in pair_rows(25)
    ]
    batch = PreferenceCollator(PAD, data_spec())(rows)
    hidden = (
        torch.randn(*batch.input_ids.shape, 32, generator=torch.Generator().manual_seed(0))
        .mul(4)
        .bfloat16()
    )
    actual = loss_in_head(model, hidden, batch, pair_losses, with_metrics=True)
    logits = hidden.flatten(0, 1)[batch.completion_index] @ model.lm_head.weight.t()
    expected = (
        logits.double()
        .log_softmax(-1)
        .gather(-1, batch.completion_labels[:, None])
        .view(-1, 2)
        .t()
        .flatten()
    )
    assert logits.dtype == torch.bfloat16
    assert expected.min() < -5
    assert torch.allclose(actual.logps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}),
    ],
)
def test_scaled_and_capped_logits_equal_the_models_own(
    model_type: str, config: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        **TINY_MODEL,
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        **config,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes), dtype=torch.float32
    )
    actual, expected = scored(model, pair_batch(4)), naive(model, pair_rows(4))
    assert_same_terms(actual, expected, 1e-5)
    assert_close(gradients(model, actual.loss), gradients(model, expected.loss), 1e-4)
