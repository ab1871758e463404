"""The loss formed in the head has the value and gradient of autograd over full logits, however it
is cut.
"""

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PreTrainedModel

from orchestrator.data.collate import PackedCollator
from orchestrator.models import plain_head
from orchestrator.models.head import (
    Head,
    Scored,
    TokenTerms,
    _token_terms,
    loss_in_head,
    scored_hidden,
)
from orchestrator.models.logps import body_hidden, sequence_logps
from orchestrator.models.sums import PairSums, pair_sums
from support.tiny_parts import data_spec, pair_batch, tiny_model

VOCABULARY, PAIRS = 300, 5
BATCH = pair_batch(PAIRS)
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)  # of pairs
SIZES = {
    "one chunk": 2**26,
    "several pairs a chunk": 30 * VOCABULARY,
    "a pair in many": 3 * VOCABULARY,
    "a row": 1,
}
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)


pytestmark = pytest.mark.usefixtures("no_memory_is_zero_by_chance")


def pair_losses(pairs: slice, sums: PairSums) -> torch.Tensor:
    """[b] a loss whose slope differs from pair to pair."""
    chosen, rejected = sums.logps.unbind(1)
    return -logsigmoid(0.3 * (chosen - 0.9 * rejected)) * WEIGHTS[pairs] / PAIRS


def alike(logps: torch.Tensor) -> PairSums:
    """[b, 2] of tokens that all weigh 1."""
    return PairSums(logps, logps[:, 0], None)


def random_hidden(dtype: torch.dtype, size: int = 32) -> torch.Tensor:
    """[R, T, H] as of the body."""
    shape = (*BATCH.input_ids.shape, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )


class StepNumbers(NamedTuple):
    loss: torch.Tensor
    logps: torch.Tensor
    tokens: TokenTerms
    gradients: list[torch.Tensor | None]  # of the hidden states and of each parameter of the head


def finished(
    scored: Scored, hidden: torch.Tensor, head: torch.nn.Module, scale: float
) -> StepNumbers:
    leaves = [hidden, *head.parameters()]
    for leaf in leaves:
        leaf.grad = None
    (scored.loss * scale).backward()
    assert scored.tokens is not None
    gradients = [None if leaf.grad is None else leaf.grad / scale for leaf in leaves]
    return StepNumbers(scored.loss.detach(), scored.logps, scored.tokens, gradients)


def in_head(model: PreTrainedModel, hidden: torch.Tensor, scale: float = 1.0) -> StepNumbers:
    return finished(
        loss_in_head(model, hidden, BATCH, pair_losses, True), hidden, Head.of(model).module, scale
    )


def by_autograd(model: PreTrainedModel, hidden: torch.Tensor) -> StepNumbers:
    """The path that any other head takes."""
    head = Head.of(model)
    actual, _, tokens = _token_terms(
        head, scored_hidden(hidden, BATCH), BATCH.completion_labels, True
    )
    sums = alike(pair_sums(actual, BATCH.scored))
    scored = Scored(pair_losses(slice(None), sums).sum(), sums.detached(), tokens)
    return finished(scored, hidden, head.module, 1.0)


def naive(model: PreTrainedModel, hidden: torch.Tensor) -> StepNumbers:
    """From the logits of every position, padding and prompts too; one sequence at a time."""
    head = Head.of(model).module
    logits = head(hidden).flatten(0, 1)[BATCH.completion_index] * Head.of(model).scale
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(1, BATCH.completion_labels[:, None])[:, 0]
    sums = torch.stack([part.double().sum() for part in picked.split(list(BATCH.scored))]).view(
        -1, 2
    )
    loss = sum(
        (pair_losses(slice(i, i + 1), alike(sums[i : i + 1]))[0] for i in range(PAIRS)),
        torch.zeros(()),
    )
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    top1 = (logits.argmax(-1) == BATCH.completion_labels).to(logits.dtype)
    tokens = TokenTerms(entropy.detach(), logits.mean(-1).detach(), top1)
    return finished(Scored(loss, alike(sums.detach()), tokens), hidden, head, 1.0)


def assert_near(left: StepNumbers, right: StepNumbers, tolerance: float) -> None:
    assert torch.allclose(left.loss, right.loss, rtol=tolerance, atol=tolerance)
    assert torch.allclose(left.logps, right.logps, rtol=tolerance, atol=tolerance)
    for name, a, b in zip(TokenTerms._fields, left.tokens, right.tokens, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), name
    for a, b in zip(left.gradients, right.gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).norm() <= tolerance * b.norm()


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_value_gradient_and_metrics_equal_autograd(
    size: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hidden = tiny_model(dtype=dtype), random_hidden(dtype).requires_grad_()
    expected = naive(model, hidden)
    assert expected.gradients[0] is not None
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    assert_near(in_head(model, hidden), expected, tolerance)
    assert_near(by_autograd(model, hidden), expected, tolerance)


LD_ALPHA = 0.3


def of_everything(pairs: slice, sums: PairSums) -> torch.Tensor:
    """[b] a loss of all that a loss may see."""
    assert sums.aligned is not None
    return (pair_losses(pairs, sums) - 0.1 * sums.chosen * WEIGHTS[pairs]) * sums.aligned.sum(
        1
    ).exp()


def naive_everything(model: PreTrainedModel, hidden: torch.Tensor) -> Scored:
    """One token at a time."""
    logits = Head.of(model).module(hidden).flatten(0, 1)[BATCH.completion_index]
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(1, BATCH.completion_labels[:, None])[:, 0]
    aligned = (picked - log_probs.exp().square().sum(-1).log()).detach().split(list(BATCH.scored))
    sequences = picked.split(list(BATCH.scored))
    sums: list[torch.Tensor] = []
    for i, each in enumerate(sequences):
        shorter = min(BATCH.scored[i], BATCH.scored[i ^ 1])
        sums.append(
            torch.stack(
                [each[k] * (1 if k < shorter else LD_ALPHA) for k in range(len(each))]
            ).sum()
        )
    chosen = torch.stack([each.sum() for each in sequences[::2]])
    means = torch.stack([each.mean() for each in aligned]).view(-1, 2)
    actual = PairSums(torch.stack(sums).view(-1, 2), chosen, means)
    return Scored(of_everything(slice(None), actual).sum(), actual.detached(), None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plain", [True, False], ids=["plain head", "any head"])
def test_tokens_that_weigh_less_and_how_the_policy_would_have_written_them(
    plain: bool, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({BATCH.scored[i] > BATCH.scored[i + 1] for i in range(0, 2 * PAIRS, 2)}) == 2
    model, hidden = tiny_model(dtype=torch.float64), random_hidden(torch.float64).requires_grad_()
    leaves = [hidden, *Head.of(model).module.parameters()]
    expected = naive_everything(model, hidden)
    slopes = torch.autograd.grad(expected.loss, leaves)
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    if not plain:
        monkeypatch.setattr(Head, "is_plain", False)
    with torch.no_grad():
        unlearned = loss_in_head(model, hidden, BATCH, of_everything, False, LD_ALPHA, True)
    actual = loss_in_head(model, hidden, BATCH, of_everything, False, LD_ALPHA, True)
    for each, right in zip(torch.autograd.grad(actual.loss, leaves), slopes, strict=True):
        assert (each - right).norm() <= 1e-12 * right.norm()
    for built in (actual, unlearned):
        assert built.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        for name, each, right in zip(PairSums._fields, built.sums, expected.sums, strict=True):
            assert torch.allclose(each, right, rtol=1e-12), name


def test_pairs_are_cut_as_the_sizes_above_say() -> None:
    lengths = [BATCH.scored[2 * i] + BATCH.scored[2 * i + 1] for i in range(PAIRS)]
    groups = {
        name: list(plain_head._groups(BATCH.scored, max(1, size // VOCABULARY)))
        for name, size in SIZES.items()
    }
    assert len(groups["one chunk"]) == 1
    assert 1 < len(groups["several pairs a chunk"]) < PAIRS
    assert len(groups["a pair in many"]) == PAIRS
    assert max(lengths) > 2 * 3
    for cut in groups.values():
        assert [i for pairs, _ in cut for i in range(PAIRS)[pairs]] == list(range(PAIRS))
        assert [i for _, tokens in cut for i in range(sum(lengths))[tokens]] == list(
            range(sum(lengths))
        )


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_the_loss_scale_of_fp16_scales_the_gradient_exactly(
    size: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    model, hidden = tiny_model(dtype=dtype), random_hidden(dtype).requires_grad_()
    scaled, plain = in_head(model, hidden, scale=2.0**16), in_head(model, hidden)
    for a, b in zip(scaled.gradients, plain.gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)  # by a power of two


@pytest.mark.parametrize("share", [1.0, 2.0**-30])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_sixteen_bits_are_near_even_where_a_pair_counts_little(
    size: str, kind: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hidden = tiny_model(), random_hidden(torch.float32).requires_grad_()
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTS", WEIGHTS * share)
    expected = naive(model, hidden)
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    with torch.autocast("cpu", kind):
        actual = in_head(model, hidden)
    assert_near(actual._replace(tokens=expected.tokens), expected, 2e-2)
    assert torch.allclose(actual.tokens.entropy, expected.tokens.entropy, rtol=2e-2)


@DTYPES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts_get_no_gradient_and_the_rest_is_unchanged(
    frozen: str, size: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    model, hidden = tiny_model(dtype=dtype), random_hidden(dtype).requires_grad_(frozen == "head")
    model.get_output_embeddings().weight.requires_grad_(frozen == "body")
    actual, expected = in_head(model, hidden), naive(model, hidden)
    assert [built is None for built in actual.gradients] == [frozen == "body", frozen == "head"]
    assert_near(actual, expected, tolerance)


class Largest(TorchDispatchMode):
    """Watches every tensor that is made: the most elements of any of logits' shape, and the shapes
    of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.shapes = 0, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        actual = func(*args, **(kwargs or {}))
        for tensor in actual if isinstance(actual, (tuple, list)) else [actual]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.shapes.add(tuple(tensor.shape))
                if tensor.shape[-1:] == (VOCABULARY,):
                    self.logits = max(self.logits, tensor.numel())
        return actual


@pytest.mark.parametrize("options", [(), (LD_ALPHA, True)], ids=["plain", "ld_alpha, aligned"])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_no_more_logits_than_allowed_are_made(
    size: str, with_gradient: bool, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    model, hidden = tiny_model(), random_hidden(torch.float32).requires_grad_()
    with Largest() as watched, torch.set_grad_enabled(with_gradient):
        scored = loss_in_head(model, hidden, BATCH, pair_losses, True, *options)
        if with_gradient:
            scored.loss.backward()
    assert 0 < watched.logits <= max(SIZES[size], VOCABULARY)
    # the head never sees prompts or padding
    assert watched.logits <= len(BATCH.completion_labels) * VOCABULARY


@pytest.mark.parametrize("size", SIZES)
def test_without_gradients_the_value_is_equal_and_none_is_formed(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hidden = tiny_model(dtype=torch.float64), random_hidden(torch.float64).requires_grad_()
    expected = naive(model, hidden)
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    with Largest() as watched, torch.no_grad():
        scored = loss_in_head(model, hidden, BATCH, pair_losses, True)
    assert not scored.loss.requires_grad
    assert scored.tokens is not None
    assert_near(
        expected._replace(loss=scored.loss, logps=scored.logps, tokens=scored.tokens),
        expected,
        1e-12,
    )
    weight = tuple(Head.of(model).module.weight.shape)
    assert weight not in watched.shapes, "a gradient of the weight was made room for"


def test_log_probs_of_a_trainable_model_carry_no_gradient() -> None:
    trainable, frozen = tiny_model(), tiny_model().requires_grad_(False)
    assert torch.equal(sequence_logps(trainable, BATCH), sequence_logps(frozen, BATCH))


def test_metrics_are_not_computed_without_a_reader() -> None:
    model, hidden = tiny_model(dtype=torch.float64), random_hidden(torch.float64).requires_grad_()
    expected = in_head(model, hidden)
    scored = loss_in_head(model, hidden, BATCH, pair_losses, False)
    assert scored.tokens is None
    assert torch.equal(scored.loss, expected.loss)
    assert torch.equal(scored.logps, expected.logps)


def test_a_batch_that_scores_nothing_has_a_gradient_of_zeros() -> None:
    model = tiny_model(dtype=torch.float64)
    row = {"pair_id": 1, "prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}
    batch = PackedCollator(data_spec())([row])
    hidden = torch.ones(1, 2, 32, dtype=torch.float64, requires_grad=True)
    scored = loss_in_head(model, hidden, batch, pair_losses, True)
    scored.loss.backward()
    assert scored.logps.tolist() == [0, 0]
    assert hidden.grad is not None
    assert not hidden.grad.any()


# --- heads of other models ------------------------------------------------------------------------


def of_two_layers(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def whole_model_logps(model: PreTrainedModel) -> torch.Tensor:
    """[2B], all chosen first, from the model's own logits."""
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits.flatten(
        0, 1
    )
    picked = (
        logits[BATCH.completion_index]
        .log_softmax(-1)
        .gather(1, BATCH.completion_labels[:, None])[:, 0]
    )
    sums = torch.stack([part.double().sum() for part in picked.split(list(BATCH.scored))])
    return sums.view(-1, 2).t().flatten()


def model_gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert left.keys() == right.keys()
    for name, expected in right.items():
        assert (left[name] - expected).norm() <= tolerance * expected.norm().clamp_min(1e-12), name


CASES = {
    "tied": lambda: tiny_model(dtype=torch.float64, tie_word_embeddings=True),
    "untied": lambda: tiny_model(dtype=torch.float64, tie_word_embeddings=False),
    "Cohere, which scales": lambda: of_two_layers(
        CohereConfig(**SMALL, logit_scale=0.25, pad_token_id=0)
    ),
    "Gemma 2, which caps": lambda: of_two_layers(
        Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=3.0)
    ),
}


@pytest.mark.parametrize("size", ["one chunk", "a pair in many"])
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_the_gradient_of_the_models_own_logits(
    case: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embeddings too, which get a part from the head and one from the body."""
    model = CASES[case]()
    assert Head.of(model).is_plain == (case != "Gemma 2, which caps")
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", SIZES[size])
    scored = loss_in_head(model, body_hidden(model, BATCH), BATCH, pair_losses, True)
    actual = model_gradients(model, scored.loss)
    expected = whole_model_logps(model)
    # their norms and soft caps are in fp32 somewhere, whatever the model's type
    exact = case in ("tied", "untied")
    assert torch.allclose(scored.logps, expected.detach(), rtol=0, atol=1e-10 if exact else 1e-5)
    loss = pair_losses(slice(None), alike(expected.view(2, -1).t())).sum()
    assert_same_gradients(actual, model_gradients(model, loss), 1e-10 if exact else 1e-5)


def test_a_head_with_a_bias_takes_the_other_path_and_its_bias_is_trained() -> None:
    model, hidden = tiny_model(dtype=torch.float64), random_hidden(torch.float64).requires_grad_()
    biased = torch.nn.Linear(32, VOCABULARY, dtype=torch.float64)
    model.set_output_embeddings(biased)
    assert not Head.of(model).is_plain
    actual, expected = in_head(model, hidden), naive(model, hidden)
    assert len(actual.gradients) == 3
    assert_near(actual, expected, 1e-12)
