"""Five optimizer steps of ours have the numbers of TRL and of plain fp64 arithmetic, metric by
metric.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.data.collate import Counts, PackedCollator
from orchestrator.dpo.step import PairStep
from orchestrator.models import plain_head
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import build_reference
from orchestrator.models.policy import build_policy, load_tokenizer
from orchestrator.settings.run import RunSpec
from orchestrator.training.prepare import prepare
from support.tiny_settings import TINY_MODEL, random_rows, tiny_spec, write_jsonl
from support.training_parity import (
    BETA,
    GRADIENT_TOLERANCE,
    INITIALIZER_RANGE,
    KINDS,
    MAX_LENGTH,
    METRICS,
    PAIRS,
    STEPS,
    TOLERANCE,
    Case,
    disagreements,
    exact_adam,
    exact_model,
    exact_steps,
    ours,
    trl_side,
    worst,
)
from support.trl_trainer import need_trl

need_trl()


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads that share a sum decides its rounding; for tensors this small they only
    wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, folder = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    rows = random_rows(PAIRS, seed=11)
    write_jsonl(folder / "train.jsonl", random_rows(64))  # of the tokenizer
    write_jsonl(folder / "pairs.jsonl", rows)
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    shape = {**TINY_MODEL, "tie_word_embeddings": kind.tied, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(kind.model_type, initializer_range=INITIALIZER_RANGE, **shape)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for vector in [p for p in model.parameters() if p.ndim < 2]:
        # norms of 1 and biases of 0 would hide what is done with them
        vector.data += 0.1 * torch.randn_like(vector)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    trl_rows, trl_trace, trl_gradient = trl_side(
        folder / "trl", folder / "model", tokenizer, rows, kind
    )
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in trl_rows) > MAX_LENGTH
    exact_trace, exact_gradient = exact_adam(folder / "model", trl_rows, kind.weight_decay)
    norms = [line["grad_norm"] for line in exact_trace]
    assert norms[0] > 1 > norms[-1]  # clipping acts in some steps and not in others
    return Case(kind, folder, trl_rows, trl_trace, trl_gradient, exact_trace, exact_gradient)


only_qwen2 = pytest.mark.parametrize("case", ["qwen2"], indirect=True)


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_five_steps_in_fp32(case: Case, micro_batch_size: int) -> None:
    trace = ours(
        case.spec(f"micro_{micro_batch_size}", batch={"micro_batch_size": micro_batch_size})
    )

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    # no farther from TRL than TRL is from the truth
    assert disagreements(trace, case.trl_trace, TOLERANCE, slack=case.exact_trace) == []


@only_qwen2
@pytest.mark.parametrize("attention", ["padded", "sdpa"])
def test_five_steps_with_another_attention(case: Case, attention: str) -> None:
    trace = ours(case.spec(attention, model={"attention": attention}))

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    assert disagreements(trace, case.trl_trace, TOLERANCE, slack=case.exact_trace) == []


def test_the_first_step_is_ln_2(case: Case) -> None:
    """The policy is its own reference, bit for bit, so rewards are no rounding error but zero, and
    a tie is no win.
    """
    first = ours(case.spec("first"))[0]

    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/chosen"], first["rewards/rejected"], first["rewards/margins"]) == (
        0,
        0,
        0,
    )
    assert first["rewards/accuracies"] == 0.0


def test_five_steps_in_fp64(case: Case) -> None:
    assert disagreements(ours(case.spec("fp64", precision="fp64")), case.exact_trace, 1e-9) == []


def first_gradient(case: Case, spec: RunSpec) -> dict[str, torch.Tensor]:
    """The gradient of a run's first step before clipping, in one micro-batch."""
    prepared = prepare(spec)
    policy = build_policy(spec, prepared.tokenizer, torch.float32)
    reference = build_reference(spec, policy, torch.float32)
    for model in (policy, reference.model):
        use_packed_attention(model, "cpu")
    step = PairStep(policy, reference, spec.dpo)
    batch = PackedCollator(spec.data)([prepared.train[index] for index in range(PAIRS)])
    step(batch, Counts(PAIRS, 0)).loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_the_first_gradient(case: Case) -> None:
    gradient = first_gradient(case, case.spec("gradient"))

    assert worst(gradient, case.exact_gradient) < GRADIENT_TOLERANCE
    assert worst(gradient, case.trl_gradient) < GRADIENT_TOLERANCE


def test_gradient_checkpointing(case: Case) -> None:
    spec = case.spec("checkpointing", training={"gradient_checkpointing": True})
    calls = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: calls.append(1) if type(module).__name__.endswith("MLP") else None
    )
    with hook:
        trace = ours(spec)

    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    # two passes that check the head, one each that looks for later tokens, for noise and for
    # weights without a gradient, two of each model that check the packed row; in each step the
    # policy and its layers again for the backward pass; the reference once, as every step has the
    # same pairs; the final weights once, whose log-probs must be finite
    assert len(calls) == TINY_MODEL["num_hidden_layers"] * (2 + 3 + 4 + 2 * STEPS + 1 + 1)


@only_qwen2
def test_the_head_in_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long batches cut the logits into chunks, which are made again in the backward pass; here of 7
    tokens.
    """
    before = first_gradient(case, case.spec("whole"))
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", 7 * len(load_tokenizer(case.spec("whole"))))

    assert disagreements(ours(case.spec("chunks")), case.exact_trace, TOLERANCE) == []
    assert worst(first_gradient(case, case.spec("chunks")), before) < GRADIENT_TOLERANCE


@only_qwen2
def test_another_optimizer_and_schedule_of_torch(case: Case) -> None:
    rate, schedule = 0.2, {"step_size": 2, "gamma": 0.1}
    model = exact_model(case.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    exact, _ = exact_steps(
        model, case.trl_rows, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, **schedule)
    )

    trace = ours(
        case.spec(
            "sgd",
            optimizer={"name": "torch.optim.SGD", "lr": rate, "kwargs": {"momentum": 0.9}},
            scheduler={"name": "torch.optim.lr_scheduler.StepLR", "kwargs": schedule},
        )
    )

    assert disagreements(trace, exact, TOLERANCE) == []
    assert [line["learning_rate"] for line in trace] == [line["learning_rate"] for line in exact]
    assert [line["learning_rate"] for line in trace] == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002])
    assert trace[-1]["loss"] < 0.9 * trace[0]["loss"]


# --- that the comparisons above can fail ----------------------------------------------------------


@only_qwen2
@pytest.mark.parametrize("name", METRICS)
def test_a_perturbed_number_is_noticed(case: Case, name: str) -> None:
    trace = copy.deepcopy(case.exact_trace)
    assert disagreements(trace, case.exact_trace, TOLERANCE) == []
    trace[3][name] += 2 * TOLERANCE * max(1.0, abs(trace[3][name]))
    differences = disagreements(trace, case.exact_trace, TOLERANCE)
    assert [line.split(":")[0] for line in differences] == [f"step 4 {name}"]
    trace[3][name] = math.nan
    assert len(disagreements(trace, case.exact_trace, TOLERANCE)) == 1

    beyond = copy.deepcopy(case.trl_trace)
    distance = abs(case.trl_trace[3][name] - case.exact_trace[3][name])
    beyond[3][name] += distance + 2 * TOLERANCE * max(1.0, abs(beyond[3][name]))
    assert len(disagreements(beyond, case.trl_trace, TOLERANCE, slack=case.exact_trace)) == 1


@only_qwen2
@pytest.mark.parametrize(
    ("wrong", "first_seen"),
    # a tenth of a per cent; in the first step the loss is ln 2 whatever beta is, but the gradient
    # is not
    [({"beta": BETA * 1.001}, "step 1 grad_norm"), ({"pairs": PAIRS - 1}, "step 1 loss")],
)
def test_a_wrong_program_is_noticed(case: Case, wrong: dict[str, Any], first_seen: str) -> None:
    trace, gradient = exact_adam(case.model, case.trl_rows, **wrong)
    values = [line.split(":")[0] for line in disagreements(trace, case.exact_trace, TOLERANCE)]

    assert values[0] == first_seen
    assert "step 5 loss" in values
    assert worst(gradient, case.exact_gradient) > GRADIENT_TOLERANCE


@only_qwen2
def test_a_wrong_setting_of_ours_is_noticed(case: Case) -> None:
    differences = disagreements(
        ours(case.spec("wrong", dpo={"beta": BETA * 1.001})), case.exact_trace, TOLERANCE
    )

    assert "step 2 loss" in [line.split(":")[0] for line in differences]
