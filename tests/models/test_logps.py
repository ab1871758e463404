"""Log-probs equal a naive computation, in value and gradient, however the head is cut into chunks."""

import math
from typing import Any

import pytest
import torch
from tiny import PAD, data_spec, pair_batch, pair_rows, tiny_model

from orchestrator.data.collate import PairBatch, PreferenceCollator
from orchestrator.models import logps as module
from orchestrator.models.logps import TokenTerms, body_hidden, sequence_sums, token_terms

VOCABULARY = 300


def terms(model: Any, batch: PairBatch) -> TokenTerms:
    return token_terms(model, body_hidden(model, batch), batch)


def naive(model: Any, batch: PairBatch) -> TokenTerms:
    """The same from the whole model's logits, one sequence and one token at a time."""
    found: list[list[torch.Tensor]] = []
    width = batch.input_ids.shape[1]
    for flat, label in zip(batch.completion_index.tolist(), batch.completion_labels.tolist(), strict=True):
        sequence, position = divmod(flat, width)
        length = int(batch.attention_mask[sequence].sum())
        logits = model(input_ids=batch.input_ids[sequence : sequence + 1, :length]).logits[0, position]
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum()
        found.append([logp[label], entropy, logits.mean(), (logits.argmax() == label).double()])
    return TokenTerms(*(torch.stack(column) for column in zip(*found, strict=True)))


def test_token_terms_equal_a_naive_computation() -> None:
    model, batch = tiny_model(dtype=torch.float64), pair_batch(5)
    for name, ours, expected in zip(TokenTerms._fields, terms(model, batch), naive(model, batch), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12), name


def test_the_most_probable_token_is_found() -> None:
    model, batch = tiny_model(dtype=torch.float64), pair_batch(3)
    first = terms(model, batch)
    hidden = body_hidden(model, batch)
    best = model.lm_head(hidden.flatten(0, 1)[batch.completion_index]).argmax(-1)  # pyright: ignore
    assert first.is_top1.mean() < 0.5
    assert terms(model, batch._replace(completion_labels=best)).is_top1.tolist() == [1.0] * len(best)


def test_only_log_probs_carry_a_gradient() -> None:
    found = terms(tiny_model(), pair_batch(3))
    assert [tensor.requires_grad for tensor in found] == [True, False, False, False]


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_chunks_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch, rows: int, tied: bool) -> None:
    model, batch = tiny_model(dtype=torch.float64, tie_word_embeddings=tied), pair_batch(5)
    scale = torch.linspace(-1, 2, len(batch.completion_labels), dtype=torch.float64)
    results = []
    for logits in (2**26, rows * VOCABULARY):
        monkeypatch.setattr(module, "CHUNK_LOGITS", logits)
        model.zero_grad()
        found = terms(model, batch)
        (found.logps @ scale).backward()
        results.append((found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (whole, whole_grads), (chunked, chunked_grads) = results
    for name, left, right in zip(TokenTerms._fields, whole, chunked, strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-13), name
    assert whole_grads.keys() == chunked_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in whole_grads.items():
        assert torch.allclose(grad, chunked_grads[name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_more_logits_than_allowed_are_alive(monkeypatch: pytest.MonkeyPatch, with_gradient: bool) -> None:
    model, batch = tiny_model(), pair_batch(5)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * VOCABULARY + 1)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))  # pyright: ignore
    with torch.set_grad_enabled(with_gradient):
        found = terms(model, batch)
    forward = sum(sizes)
    if with_gradient:
        found.logps.sum().backward()
        assert sum(sizes) == 2 * forward  # made again in the backward pass, so not kept for it
    assert max(sizes) <= 4 * VOCABULARY
    assert forward == len(batch.completion_labels) * VOCABULARY  # the head never sees prompts or padding


def test_padding_does_not_matter() -> None:
    model, rows = tiny_model(dtype=torch.float64), pair_rows(4)
    collate = PreferenceCollator(PAD, data_spec())
    together = sequence_sums(terms(model, batch := collate(rows)).logps, batch).view(2, 4)
    for index, row in enumerate(rows):
        alone = sequence_sums(terms(model, one := collate([row])).logps, one)
        assert torch.allclose(together[:, index], alone, rtol=0, atol=1e-12)


def test_a_batch_without_completion_tokens_gives_nothing() -> None:
    row = {"pair_id": 1, "prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}
    batch = PreferenceCollator(PAD, data_spec())([row])
    found = terms(tiny_model(), batch)
    assert [len(column) for column in found] == [0, 0, 0, 0]
    assert sequence_sums(found.logps, batch).tolist() == [0.0, 0.0]


def test_sums_are_fp64() -> None:
    batch = pair_batch(2)
    values = torch.rand(len(batch.completion_labels), generator=torch.Generator().manual_seed(0)) * 1e4 + 0.1
    sums = sequence_sums(values, batch)
    assert sums.dtype == torch.float64
    for sequence in range(4):
        exact = math.fsum(values[batch.completion_sequence == sequence].tolist())
        assert sums[sequence].item() == pytest.approx(exact, rel=1e-15)


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    logits = (torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    labels = torch.arange(50)
    found = module._terms(logits, labels)
    expected = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert found.logps.dtype == torch.float32
    assert torch.allclose(found.logps.double(), expected, rtol=0, atol=1e-5)
