"""Packed pairs give the numbers of padded ones, in every architecture that is said to, by every
kernel.
"""

import copy
import threading
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.data.collate import Counts, PackedCollator, PairBatch, PreferenceCollator, Row
from orchestrator.dpo.step import METRICS, PairStep, StepOutput
from orchestrator.engines.precision import autocast
from orchestrator.models import attention
from orchestrator.models.attention import (
    CHECKED,
    LAYOUT,
    choose_kernel,
    not_exact,
    use_packed_attention,
)
from orchestrator.models.fused import fuse
from orchestrator.models.layout_check import packed_error
from orchestrator.models.logps import body_hidden
from orchestrator.models.reference import Reference
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec, LossType
from orchestrator.settings.model import AttentionName
from orchestrator.training.layout import PACKED_TOLERANCE
from support.tiny_parts import PAD, data_spec, pair_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 1},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": None},
    "gemma": {**LLAMA, "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": GPT2,
}
LAYERS = 2


def config_of(kind: str, **more: Any) -> Any:
    return AutoConfig.for_model(
        kind, vocab_size=300, initializer_range=0.2, **{**KINDS.get(kind, {}), **more}
    )


@lru_cache(maxsize=64)
def random_model(kind: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(kind), dtype=dtype).train()
    with torch.no_grad():
        for vector in [
            p for p in model.parameters() if p.ndim < 2
        ]:  # norms of 1 and biases of 0 would hide much
            vector += torch.linspace(-0.3, 0.3, vector.numel(), dtype=dtype)
    fuse(model)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the weights; deepcopy would copy the norms that fuse has bound to the first one."""
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype).train()
    other.load_state_dict(model.state_dict())
    fuse(other)
    return other


def step_of(
    kind: str,
    dtype: torch.dtype,
    kernel: AttentionName = "padded",
    recompute: bool = False,
    loss: LossType = "sigmoid",
) -> PairStep:
    policy, reference = (twin(random_model(kind, dtype, seed)) for seed in (0, 1))
    for model in (policy, reference):
        if kernel != "padded":
            use_packed_attention(model, kernel)
    if recompute:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.disable_input_require_grads()
    return PairStep(policy, Reference(reference), DpoSpec(beta=0.3, loss_type=loss))


kept_step = lru_cache(maxsize=256)(step_of)


@pytest.fixture(scope="module", autouse=True)
def no_memory_is_zero_by_chance() -> Iterator[None]:
    """Deterministic mode fills new tensors with NaN, so that one that is read before it is written
    shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Made(NamedTuple):
    output: StepOutput
    gradient: torch.Tensor


def run(step: PairStep, batch: PairBatch) -> Made:
    step.zero_grad()
    output: StepOutput = step(batch, Counts(7, 1))
    output.loss.backward()
    return Made(output, gradient(step))


def gradient(step: PairStep) -> torch.Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in step.parameters()
        ]
    )


def both(rows: list[Row], keep_last: int | None = None) -> tuple[PairBatch, PairBatch]:
    """(padded, packed)."""
    data = data_spec(truncation="keep_end", max_length=keep_last) if keep_last else data_spec()
    return PreferenceCollator(PAD, data)(rows), PackedCollator(data)(rows)


WINS = METRICS.index("rewards/accuracies")


def assert_equal(packed: Made, padded: Made) -> None:
    for name in ("loss", "logps", "ref_logps", "metric_sums"):
        left, right = getattr(packed.output, name), getattr(padded.output, name)
        allowed = torch.full_like(right, 1e-10)
        if name == "metric_sums":
            allowed[WINS, 0] += ties(padded.output)
        assert ((left - right).abs() <= allowed + 1e-10 * right.abs()).all(), (
            name,
            (left - right).abs().max(),
        )
    assert torch.allclose(packed.gradient, padded.gradient, rtol=1e-10, atol=1e-10)


def ties(output: StepOutput) -> int:
    """Return the number of pairs with equal rewards: rounding, which differs between CPUs, decides
    who wins.
    """
    chosen, rejected = (output.logps - output.ref_logps).chunk(2)
    return int(((chosen - rejected).abs() <= 1e-10).sum())


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    """Relative to the norm of the right one."""
    return float((left - right).norm() / right.norm().clamp_min(1e-12))


def pair(prompt: int, chosen: list[int], rejected: list[int]) -> Row:
    return {
        "pair_id": 1,
        "prompt_ids": [40 + i % 200 for i in range(prompt)],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


# What each of these does to a batch is not to be left to chance.
EDGES = [
    pair(0, [5, 6, 7], [8, 9]),  # the first token of each completion has none before it
    pair(0, [5, 6, 7], [5, 6, 9, 10]),  # no prompt, and yet something is shared
    pair(4, [5], [6]),  # one-token completions: only the prompt's last token scores
    pair(3, [5, 6], [5, 6, 7, 8]),  # chosen a prefix of rejected
    pair(3, [5, 6, 7], [5]),  # rejected a prefix of chosen: its own run is empty
    pair(12, [5, 6, 7], [8, 9, 10, 11, 12]),  # cut to 6, the two keep different parts of the prompt
    pair(9, [7, 5, 6, 1, 2, 3], [8, 9]),  # cut to 6, the chosen one keeps nothing of the prompt
    pair(2, [5, 6, 7, 8, 9, 10, 11], [1, 6, 7, 8, 9, 10, 11]),  # cut to 6, the two are the same
]
NOTHING = [pair(0, [5], [6])]  # nothing is scored at all


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    few = st.integers(0, 3) | st.integers(0, 250)  # small ids agree by chance

    def some(least: int, most: int) -> list[int]:
        return draw(st.lists(few, min_size=least, max_size=most))

    rows: list[Row] = []
    for number in range(draw(st.integers(1, 4))):
        prompt, chosen, rest = some(0, 12), some(1, 7), some(1, 5)
        rejected = [*chosen, *rest] if draw(st.booleans()) else rest
        # else the two gradients cancel, and what is left is rounding; 6: the longest that they are
        # cut to
        assume(chosen[-6:] != rejected[-6:])
        rows.append(
            {
                "pair_id": number,
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
            }
        )
    return rows


def each_batch(test: Any) -> Any:
    for example_of in (
        example(EDGES, 6, "sigmoid"),
        example(EDGES, None, "ipo"),
        example([EDGES[0]], None, "ipo"),
        example(NOTHING, None, "sigmoid"),
    ):
        test = example_of(test)
    drawn = given(batches(), st.sampled_from([None, 6]), st.sampled_from(["sigmoid", "ipo"]))
    return settings(derandomize=True, max_examples=10, deadline=None, database=None)(drawn(test))


def test_every_checked_architecture_is_compared_here() -> None:
    assert set(KINDS) == set(CHECKED)


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_packed_equals_padded_in_fp64(kind: str, kernel: AttentionName) -> None:
    @each_batch
    def compare(rows: list[Row], keep_last: int | None, loss: LossType) -> None:
        padded, packed = both(rows, keep_last)
        steps = [kept_step(kind, torch.float64, each, False, loss) for each in ("padded", kernel)]
        assert_equal(run(steps[1], packed), run(steps[0], padded))

    compare()


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_packed_equals_padded_in_fp32(kind: str, kernel: AttentionName) -> None:
    @each_batch
    def compare(rows: list[Row], keep_last: int | None, loss: LossType) -> None:
        padded, packed = both(rows, keep_last)
        expected, actual = (
            run(kept_step(kind, torch.float32, each, False, loss), batch)
            for each, batch in (("padded", padded), (kernel, packed))
        )
        assert abs(actual.output.loss - expected.output.loss) < 5e-6 * max(
            1.0, abs(expected.output.loss)
        )
        assert far(actual.gradient, expected.gradient) < 2e-5

    compare()


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_a_run_of_many_causal_blocks_is_exact(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", block)
    for keep_last in (None, 6):
        padded, packed = both([*EDGES, *pair_rows(3, longest=15)], keep_last)
        expected = run(kept_step("qwen2", torch.float64), padded)
        assert_equal(run(kept_step("qwen2", torch.float64, "cpu"), packed), expected)


def test_a_pair_longer_than_a_causal_block_is_exact() -> None:
    long = pair(400, list(range(250)) + [7] * 50, list(range(1, 250)) + [9] * 300)
    padded, packed = both([long])
    expected = run(kept_step("llama", torch.float64), padded)
    assert_equal(run(kept_step("llama", torch.float64, "cpu"), packed), expected)


def test_ipo_divides_by_the_unscored_first_token_of_an_empty_prompt_too() -> None:
    for batch in both([EDGES[0]]):
        assert batch.scored == (2, 1)
        assert batch.completion_tokens.tolist() == [3, 2]
    step = kept_step("qwen2", torch.float64, "cpu", False, "ipo")
    output = step(both([EDGES[0]])[1], Counts(1, 1))
    chosen, rejected = output.logps - output.ref_logps
    assert output.loss.item() == pytest.approx(
        float(chosen / 3 - rejected / 2 - 1 / 0.6) ** 2, rel=1e-12
    )


@pytest.mark.parametrize(
    "scaling", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}]
)
def test_a_scale_of_its_own_in_gpt2(scaling: dict[str, Any]) -> None:
    torch.manual_seed(0)
    padded = AutoModelForCausalLM.from_config(config_of("gpt2", **scaling), dtype=torch.float64)
    packed = twin(padded)
    use_packed_attention(packed, "cpu")
    hidden = [
        body_hidden(model, batch).flatten(0, 1)[batch.completion_index]
        for model, batch in zip((padded, packed), both(EDGES), strict=True)
    ]
    assert torch.allclose(*hidden, rtol=0, atol=1e-10)


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_checkpointing_gives_the_same_numbers(kind: str, kernel: AttentionName) -> None:
    _, packed = both(EDGES, 6)
    plain, recomputed = (
        run(step_of(kind, torch.float64, kernel, recompute), packed) for recompute in (False, True)
    )
    assert torch.equal(recomputed.output.loss, plain.output.loss)
    assert torch.equal(recomputed.gradient, plain.gradient)


def layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(
        module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)
    )


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("kind", CHECKED)
def test_frozen_layers_and_the_reference_run_once_and_the_others_twice(
    kind: str, frozen: int
) -> None:
    step, calls = step_of(kind, torch.float32, "cpu", recompute=True), Counter[str]()
    for embedding in [m for m in step.policy.modules() if isinstance(m, torch.nn.Embedding)]:
        embedding.requires_grad_(False)
    layers(step.policy)[:frozen].requires_grad_(False)
    if not frozen:  # tied to the embeddings, the head is frozen too
        step.policy.requires_grad_(True)
    for name, model in (("policy", step.policy), ("reference", step.reference.model)):
        for index, layer in enumerate(layers(model)):
            # not of the layer itself: transformers recomputes its forward without its hooks
            part = layer.get_submodule(attention.ATTENTION[kind])
            part.register_forward_pre_hook(lambda *_, key=f"{name} {index}": calls.update([key]))
    run(step, both(EDGES)[1])
    assert calls == {f"reference {index}": 1 for index in range(LAYERS)} | {
        f"policy {index}": 1 if index < frozen else 2 for index in range(LAYERS)
    }


def test_a_backward_pass_in_another_thread_recomputes_the_same() -> None:
    _, packed = both(EDGES)
    expected = run(step_of("qwen2", torch.float64, "cpu", recompute=True), packed)
    step = step_of("qwen2", torch.float64, "cpu", recompute=True)
    loss = step(packed, Counts(7, 1)).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(gradient(step), expected.gradient)


# --- the last layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHECKED)
def test_the_last_layer_computes_only_what_is_read(kind: str) -> None:
    """That gradients stay exact is asserted above: every packed run there skips."""
    step, (_, packed) = step_of(kind, torch.float32, "cpu"), both(pair_rows(4, longest=20))
    seen: list[int] = []
    for layer in layers(step.policy):
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2]))
    run(step, packed)
    assert packed.segments is not None
    scoring = len(packed.segments.scoring)
    assert seen == [packed.input_ids.shape[1], scoring]
    assert scoring < packed.input_ids.shape[1]


# --- varlen ---------------------------------------------------------------------------------------


def fake_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """A FAKE of torch's varlen_attn, which needs a GPU: the same in plain arithmetic, causal and
    bottom-right aligned, as `test_torchs_varlen_attention_is_aligned_bottom_right` checks of the
    real one.
    """
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    values = []
    for run in range(len(cu_seq_q) - 1):
        queries = slice(int(cu_seq_q[run]), int(cu_seq_q[run + 1]))
        keys = slice(int(cu_seq_k[run]), int(cu_seq_k[run + 1]))
        q, k, v = (x.transpose(0, 1) for x in (query[queries], key[keys], value[keys]))
        scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
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
        values.append(Made(output, gradient(step)))
    padded, packed = values
    assert far(packed.output.logps, padded.output.logps) < 2e-2
    assert far(packed.gradient, padded.gradient) < 5e-2


# --- everything else that goes through the model --------------------------------------------------


@pytest.mark.parametrize("kind", CHECKED)
def test_padded_batches_use_transformers_own_attention(kind: str) -> None:
    plain, ours = (twin(random_model(kind, torch.float32, 0)).eval() for _ in range(2))
    use_packed_attention(ours, "cpu")
    body_hidden(ours, both(EDGES)[1])  # leaves nothing behind
    batch, _ = both(EDGES)
    assert torch.equal(body_hidden(ours, batch), body_hidden(plain, batch))
    prompts = {
        "input_ids": batch.input_ids[:, :2],
        "attention_mask": torch.ones(len(batch.input_ids), 2),
    }
    expected, actual = (
        model.generate(
            **prompts,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (plain, ours)
    )
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(*each) for each in zip(actual.logits, expected.logits, strict=True))


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_bf16_autocast_is_near(kind: str, kernel: AttentionName) -> None:
    padded, packed = both([*EDGES, *pair_rows(3, longest=15)])
    with autocast(CPU, "bf16"):
        expected, actual = (
            run(kept_step(kind, torch.float32, each), batch)
            for each, batch in (("padded", padded), (kernel, packed))
        )
    assert far(actual.output.logps, expected.output.logps) < 2e-2
    assert far(actual.gradient, expected.gradient) < 5e-2


# --- which models, which kernels ------------------------------------------------------------------


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


# --- the check at start ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_packed_error_is_rounding(kind: str, kernel: AttentionName) -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        model = twin(random_model(kind, dtype, 0))
        use_packed_attention(model, kernel)
        assert packed_error(model, CPU) < most


@pytest.mark.parametrize("kind", CHECKED)
def test_packed_error_shows_attention_that_ignores_the_layout(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_sequence(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _: Any,
        scale: float | None,
        __: bool,
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setitem(attention.KERNELS, "cpu", one_sequence)
    model = twin(random_model(kind, torch.float32, 0))
    use_packed_attention(model, "cpu")
    assert packed_error(model, CPU) > max(PACKED_TOLERANCE.values())


def test_packed_error_shows_a_layout_that_is_dropped_on_its_way() -> None:
    """As an architecture would whose layers hand only the keywords on that they know."""
    model = twin(random_model("qwen2", torch.float32, 0))
    use_packed_attention(model, "cpu")
    for layer in layers(model):
        layer.register_forward_pre_hook(
            lambda _, inputs, options: (inputs, {k: v for k, v in options.items() if k != LAYOUT}),
            with_kwargs=True,
        )
    assert packed_error(model, CPU) > max(PACKED_TOLERANCE.values())
