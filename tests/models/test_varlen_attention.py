"""Attention by torch's varlen kernel, and the choice of a kernel."""

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from orchestrator.data.collate import Counts
from orchestrator.engines.precision import autocast
from orchestrator.models.attention import (
    CHECKED,
    choose_kernel,
    not_exact,
)
from orchestrator.settings.errors import UserError
from support.attention_models import (
    CPU,
    EDGES,
    GPU,
    StepNumbers,
    assert_equal,
    both,
    config_of,
    far,
    gradient,
    kept_step,
    pair,
    run,
    step_of,
)
from support.tiny_parts import pair_rows

pytestmark = pytest.mark.usefixtures("no_memory_is_zero_by_chance")


NOTHING = [pair(0, [5], [6])]  # nothing is scored at all


def fake_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> torch.Tensor:
    """A FAKE of torch's varlen_attn, which needs a GPU: the same in plain arithmetic, causal and
    bottom-right aligned, as `test_torchs_varlen_attention_is_aligned_bottom_right` checks of the
    real one.
    """
    assert options["window_size"] == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    values = []
    for number in range(len(cu_seq_q) - 1):
        queries = slice(int(cu_seq_q[number]), int(cu_seq_q[number + 1]))
        keys = slice(int(cu_seq_k[number]), int(cu_seq_k[number + 1]))
        q, k, v = (x.transpose(0, 1) for x in (query[queries], key[keys], value[keys]))
        scores = q @ k.mT * (options.get("scale") or q.shape[-1] ** -0.5)
        visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        values.append((scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(values)


@pytest.mark.parametrize("kind", CHECKED)
def test_varlen_gets_the_right_bounds_keys_and_shapes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fake kernel: what the real one does with them needs a GPU."""
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    for keep_last in (None, 6):
        padded, packed = both([*EDGES, *pair_rows(3, longest=15)], keep_last)
        actual = run(kept_step(kind, torch.float64, "varlen", True), packed)
        assert_equal(actual, run(kept_step(kind, torch.float64), padded))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_varlen_attention_is_aligned_bottom_right() -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(n, h, 32, device=GPU).bfloat16() for n, h in ((9, 4), (14, 2), (14, 2))
    )
    queries, keys = (
        torch.tensor(each, dtype=torch.int32, device=GPU) for each in ([0, 6, 6, 9], [0, 6, 7, 14])
    )
    options: Any = {"window_size": (-1, 0), "enable_gqa": True}
    actual = varlen.varlen_attn(query, key, value, queries, keys, 6, 7, **options)
    expected = fake_varlen_attn(
        query.float(), key.float(), value.float(), queries, keys, 6, 7, **options
    )
    assert isinstance(actual, torch.Tensor)
    assert torch.allclose(actual.float(), expected, rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", CHECKED)
def test_varlen_on_a_gpu_is_near_padded(kind: str) -> None:
    values = []
    for kernel, batch in zip(
        ("padded", "varlen"), both([*EDGES, *pair_rows(3, longest=60)]), strict=True
    ):
        step = step_of(kind, torch.float32, kernel).to(GPU)
        step.reference.model.to(GPU)
        with autocast(GPU, "bf16"):
            output = step(batch.to(GPU), Counts(7, 1))
        output.loss.backward()
        values.append(StepNumbers(output, gradient(step)))
    padded, packed = values
    assert far(packed.output.logps, padded.output.logps) < 2e-2
    assert far(packed.gradient, padded.gradient) < 5e-2


@pytest.mark.parametrize("kind", CHECKED)
def test_checked_architectures_are_exact(kind: str) -> None:
    assert not_exact(config_of(kind), 10**6) is None


def test_a_sliding_window_matters_when_a_sequence_is_longer() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    for config in (config_of("mistral", sliding_window=8), config_of("qwen2", **window)):
        assert not_exact(config, 8) is None
        assert "sliding window has 8 tokens and the longest sequence 9" in str(not_exact(config, 9))
    assert not_exact(config_of("qwen2", **{**window, "use_sliding_window": False}), 9) is None


DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gemma2", {}, "gemma2 is not among the architectures checked"),
        ("mixtral", {}, "mixtral is not among the architectures checked"),
        ("mamba", {}, "mamba is not among the architectures checked"),
        ("llama", {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 8}, "rotary"),
        ("llama", {"rope_parameters": LONG_ROPE}, "rotary"),
        ("llama", {"attention_dropout": 0.1}, "dropout in its attention"),
        ("gpt2", {"attn_pdrop": 0.1}, "dropout in its attention"),
        ("gemma", {"use_bidirectional_attention": True}, "is bidirectional"),
    ],
)
def test_a_model_that_packing_would_change_is_named(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    assert reason in str(not_exact(config_of(kind, **changes), 9))


def test_a_rotary_embedding_that_changes_with_length_is_exact_within_the_trained_one() -> None:
    assert not_exact(config_of("llama", rope_parameters=LONG_ROPE), 8) is None
    assert (
        not_exact(config_of("llama", rope_parameters=DYNAMIC_ROPE, max_position_embeddings=8), 8)
        is None
    )


@pytest.mark.parametrize(
    ("requested", "device", "precision", "cure"),
    [
        ("varlen", CPU, "bf16", "needs a GPU from Ampere on and precision bf16 or fp16; use cpu"),
        ("varlen", GPU, "fp32", "needs a GPU from Ampere on and precision bf16 or fp16; use sdpa"),
        ("cpu", GPU, "fp32", "needs a CPU; use sdpa"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused(
    requested: Any, device: torch.device, precision: Any, cure: str
) -> None:
    with pytest.raises(UserError, match=cure) as refused:
        choose_kernel(requested, device, precision)
    assert refused.value.key == "model.attention"


def test_auto_takes_the_fastest_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel("auto", CPU, "fp32") == "cpu"
    assert choose_kernel("auto", GPU, "fp32") == "sdpa"
    assert choose_kernel("sdpa", CPU, "fp32") == "sdpa"
    for capability, best in (((8, 0), "varlen"), ((7, 5), "sdpa")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, actual=capability: actual
        )
        assert choose_kernel("auto", GPU, "bf16") == best
