"""Packed pairs give the numbers of padded ones, in every architecture that is said to, by every
kernel.
"""

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from orchestrator.data.collate import Counts
from orchestrator.data.pairs import PairRow
from orchestrator.engines.precision import autocast
from orchestrator.models import attention, kernels
from orchestrator.models.attention import (
    CHECKED,
    use_packed_attention,
)
from orchestrator.models.logps import body_hidden
from orchestrator.settings.loss import LossType
from orchestrator.settings.model import AttentionName
from support.attention_models import (
    CPU,
    EDGES,
    KINDS,
    assert_equal,
    both,
    config_of,
    far,
    gradient,
    kept_step,
    layers,
    pair,
    random_model,
    run,
    step_of,
    twin,
)
from support.tiny_parts import pair_rows

LAYERS = 2


pytestmark = pytest.mark.usefixtures("no_memory_is_zero_by_chance")


NOTHING = [pair(0, [5], [6])]  # nothing is scored at all


@st.composite
def batches(draw: st.DrawFn) -> list[PairRow]:
    few = st.integers(0, 3) | st.integers(0, 250)  # small ids agree by chance

    def some(least: int, most: int) -> list[int]:
        return draw(st.lists(few, min_size=least, max_size=most))

    rows: list[PairRow] = []
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
    def compare(rows: list[PairRow], keep_last: int | None, loss: LossType) -> None:
        padded, packed = both(rows, keep_last)
        steps = [kept_step(kind, torch.float64, each, False, loss) for each in ("padded", kernel)]
        assert_equal(run(steps[1], packed), run(steps[0], padded))

    compare()


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_packed_equals_padded_in_fp32(kind: str, kernel: AttentionName) -> None:
    @each_batch
    def compare(rows: list[PairRow], keep_last: int | None, loss: LossType) -> None:
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
    monkeypatch.setattr(kernels, "CAUSAL_BLOCK", block)
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
