"""IPO of ours is IPO of TRL: loss, rewards and gradient over three steps on the same pairs, packed and padded."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from parity.parity_support import need_trl, trl_trainer
from support import TINY_MODEL, tiny_spec, write_jsonl
from support import rows as made_rows
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.data.collate import Counts, PackedCollator, PreferenceCollator, Row
from orchestrator.dpo.step import METRICS, PairStep
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.fused import fuse
from orchestrator.models.policy import load_tokenizer
from orchestrator.models.reference import Reference
from orchestrator.settings.spec import DpoSpec
from orchestrator.training.metrics import means

need_trl()

BETA, LR, STEPS, PAIRS, MAX_LENGTH = 0.1, 0.03, 3, 6, 40
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
Trace = list[dict[str, float]]


class Case(NamedTuple):
    """A model, TRL's rows of token ids, what TRL said of each step, and its first gradient."""

    model: Path
    rows: list[Row]
    trace: Trace
    gradient: torch.Tensor


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("ipo")
    rows = [*made_rows(PAIRS - 1, seed=11), {"prompt": "", "chosen": "green river", "rejected": "blue"}]
    write_jsonl(folder / "train.jsonl", made_rows(64))
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    config = AutoConfig.for_model("qwen2", initializer_range=0.1, **{**TINY_MODEL, "vocab_size": len(tokenizer)})
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trainer = trl_trainer(
        folder / "trl",
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        tokenizer,
        rows,
        loss_type="ipo",
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        beta=BETA,
        max_length=MAX_LENGTH,
    )
    trainer.model.train()
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    trainer.compute_loss(trainer.model, inputs).backward()
    gradient = flat_gradient(trainer.model).clone()
    trainer.model.zero_grad()
    for metrics in trainer._metrics.values():
        metrics.clear()
    trainer.train()
    trl_rows = [{**row, "pair_id": number} for number, row in enumerate(trainer.train_dataset)]
    return Case(folder / "model", trl_rows, [line for line in trainer.state.log_history if "loss" in line], gradient)


def ours(case: Case, packed: bool, dtype: torch.dtype) -> tuple[Trace, torch.Tensor]:
    """The same steps by plain SGD: what PairStep says of each, and its first gradient."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(case.model, dtype=dtype).train() for _ in range(2))
    for model in (policy, reference):
        fuse(model)
        if packed:
            use_packed_attention(model, "cpu")
    dpo = DpoSpec(beta=BETA, loss_type="ipo")
    step = PairStep(policy, Reference(reference), dpo)
    data = tiny_spec(case.model.parent).data.model_copy(update={"max_length": MAX_LENGTH})
    batch = (PackedCollator(data) if packed else PreferenceCollator(0, data))(case.rows)
    trace, gradient = [], torch.zeros(0)
    for number in range(STEPS):
        policy.zero_grad()
        output: Any = step(batch, Counts(PAIRS, 1))
        output.loss.backward()
        gradient = gradient if number else flat_gradient(policy).clone()
        trace.append(means(output.metric_sums.tolist()))
        with torch.no_grad():
            for p in policy.parameters():
                p -= LR * torch.zeros_like(p) if p.grad is None else LR * p.grad
    return trace, gradient


def by_hand(rows: list[Row], model: Any, reference: Any) -> float:
    """Azar et al. 2023, eq. 17, per completion token, one sequence at a time from full logits."""
    total = 0.0
    for row in rows:
        ratios = []
        for side in ("chosen_ids", "rejected_ids"):
            ids, start = torch.tensor(row["prompt_ids"] + row[side]), len(row["prompt_ids"])
            sums = []
            for each in (model, reference):
                with torch.no_grad():
                    log_probs = each(input_ids=ids[None]).logits[0].log_softmax(-1)
                scored = range(max(start, 1), len(ids))
                sums.append(sum(float(log_probs[i - 1, ids[i]]) for i in scored))
            ratios.append((sums[0] - sums[1]) / len(row[side]))
        total += (ratios[0] - ratios[1] - 1 / (2 * BETA)) ** 2
    return total / len(rows)


def test_the_rows_hold_what_matters(case: Case) -> None:
    assert len(case.trace) == STEPS
    assert any(not row["prompt_ids"] for row in case.rows)  # its first tokens are counted and not scored
    assert len({len(row["chosen_ids"]) for row in case.rows}) > 2
    assert case.trace[0]["loss"] == pytest.approx((1 / (2 * BETA)) ** 2)
    assert case.trace[-1]["loss"] < 0.95 * case.trace[0]["loss"]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_three_steps_and_the_first_gradient_are_trls(case: Case, packed: bool) -> None:
    exact, _ = ours(case, packed, torch.float64)
    found, gradient = ours(case, packed, torch.float32)
    assert set(NAMES) <= set(METRICS)
    for step in range(STEPS):
        for name in NAMES:
            ours_, trls, truth = found[step][name], case.trace[step][name], exact[step][name]
            # no farther from TRL than TRL is from the truth
            allowed = 2e-6 * max(1.0, abs(truth)) + abs(trls - truth)
            assert abs(ours_ - trls) <= allowed, (step, name)
            assert abs(trls - truth) <= 1e-4 * max(1.0, abs(truth)), (step, name)
    assert (gradient - case.gradient).norm() < 1e-4 * case.gradient.norm()


def test_the_loss_is_the_papers(case: Case) -> None:
    trained, reference = (
        AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float64).requires_grad_(False) for _ in range(2)
    )
    generator = torch.Generator().manual_seed(1)
    for p in trained.parameters():
        p += 0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    for model in (trained, reference):
        fuse(model)
    expected = by_hand(case.rows, trained, reference)
    step = PairStep(trained, Reference(reference), DpoSpec(beta=BETA, loss_type="ipo"))
    batch = PreferenceCollator(0, tiny_spec(case.model.parent).data)(case.rows)
    with torch.no_grad():
        assert step(batch, Counts(PAIRS, 1)).loss.item() == pytest.approx(expected, rel=1e-12)
    assert not math.isclose(expected, (1 / (2 * BETA)) ** 2, rel_tol=1e-3)
