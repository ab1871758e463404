"""The step depends on the global batch alone, and the reference is no part of what is trained or
saved.
"""

import hashlib
import math

import pytest
import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import METRICS, TOKEN_METRICS, PairStep, StepOutput
from orchestrator.models.reference import Reference
from orchestrator.settings.loss import DpoSpec, LossType
from orchestrator.training.metrics import means
from support.tiny_parts import both_layouts, collator, pair_batch, pair_rows, tiny_model

DPO = DpoSpec(beta=0.3)
PAIRS = 12
COUNTS = Counts(PAIRS, 1)
CUTS = [[12], [1] * 12, [2] * 6, [5, 4, 3], [1, 11]]


def made_step(
    reference_seed: int = 1, dtype: torch.dtype = torch.float64, dpo: DpoSpec = DPO
) -> PairStep:
    """For both layouts."""
    return PairStep(
        tiny_model(dtype=dtype, packed=True),
        Reference(tiny_model(reference_seed, dtype, True)),
        dpo,
    )


def micro_batches(cut: list[int], packed: bool = True) -> list[PairBatch]:
    collate, rows = collator(packed), iter(pair_rows(PAIRS))
    return [collate([next(rows) for _ in range(size)]) for size in cut]


def run(step: PairStep, batches: list[PairBatch], counts: Counts = COUNTS) -> StepOutput:
    """Forward and backward over all; loss and metrics summed, log-probs of all pairs."""
    outputs = []
    for batch in batches:
        outputs.append(step(batch, counts))
        outputs[-1].loss.backward()
    halves = [torch.cat([output.logps.chunk(2)[side] for output in outputs]) for side in (0, 1)]
    ref_halves = [
        torch.cat([output.ref_logps.chunk(2)[side] for output in outputs]) for side in (0, 1)
    ]
    loss = sum((output.loss.detach() for output in outputs), torch.zeros(()))
    metric_sums = sum((output.metric_sums for output in outputs), torch.zeros(()))
    losses = torch.cat([output.losses for output in outputs])
    return StepOutput(loss, metric_sums, torch.cat(halves), torch.cat(ref_halves), losses)


def gradients(step: PairStep) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])


def checksum(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def metrics(output: StepOutput) -> dict[str, float]:
    return means(output.metric_sums.tolist())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"]
)
@both_layouts
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_loss_gradient_and_metrics_depend_on_neither_cut_nor_layout(
    cut: list[int], packed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    whole_step, cut_step = made_step(dtype=dtype), made_step(dtype=dtype)
    whole, parts = (
        run(whole_step, micro_batches(CUTS[0])),
        run(cut_step, micro_batches(cut, packed)),
    )
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=tolerance)
    reference = gradients(whole_step)
    assert (gradients(cut_step) - reference).norm() <= 10 * tolerance * reference.norm()
    # num_tokens has no count
    sums, expected = (output.metric_sums.flatten()[:-1] for output in (parts, whole))
    assert torch.allclose(sums, expected, rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.allclose(parts.logps, whole.logps, rtol=10 * tolerance)
    assert torch.allclose(parts.ref_logps, whole.ref_logps, rtol=10 * tolerance)


def test_the_loss_is_the_mean_over_the_global_batch() -> None:
    step = made_step()
    output = run(step, micro_batches([12]))
    chosen, rejected = (output.logps - output.ref_logps).chunk(2)
    losses = torch.log1p(torch.exp(-0.3 * (chosen - rejected)))
    expected = losses.mean()
    assert torch.allclose(output.losses, losses, rtol=1e-12)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert run(step, micro_batches([12]), Counts(48, 1)).loss.item() == pytest.approx(
        expected.item() / 4, rel=1e-12
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_the_gradient_is_that_of_the_mean_loss(loss_type: LossType) -> None:
    step = made_step(dpo=DpoSpec(loss_type=loss_type, beta=0.3))
    [batch] = micro_batches([12])
    run(step, [batch])
    head = step.policy.lm_head.weight
    assert isinstance(head, torch.nn.Parameter)
    assert head.grad is not None
    grad, direction = (
        head.grad.clone(),
        torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).double(),
    )
    values = []
    with torch.no_grad():
        for sign in (1, -1, -1):
            head.add_(sign * 1e-4 * direction)
            values.append(step(batch, COUNTS).loss.item())
    slope = (values[0] - values[2]) / 2e-4
    assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


@both_layouts
def test_a_filler_contributes_exactly_nothing(packed: bool) -> None:
    plain, filled = made_step(), made_step()
    expected = run(plain, micro_batches([7, 5], packed))
    fillers = [
        pair_batch(2, 9, is_filler=True, packed=packed),
        pair_batch(1, 8, is_filler=True, packed=packed),
    ]
    outputs = run(filled, [fillers[0], *micro_batches([7, 5], packed), fillers[1]])
    assert outputs.loss.item() == expected.loss.item()
    assert torch.equal(outputs.metric_sums[:-1], expected.metric_sums[:-1])
    assert metrics(outputs) == metrics(expected)
    assert torch.equal(gradients(filled), gradients(plain))


@both_layouts
def test_a_weight_of_two_is_the_row_twice(packed: bool) -> None:
    """In loss, gradient and every metric but the tokens that were fed."""
    dpo = DpoSpec(loss_type=["sigmoid", "sft"], beta=0.3)
    weighed, repeated = made_step(dpo=dpo), made_step(dpo=dpo)
    rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(pair_rows(6))]
    heavy = [{**row, "weight": 2.0 if i in (1, 4) else 1.0} for i, row in enumerate(rows)]
    collate = collator(packed)
    twice = collate([*rows, rows[1], rows[4]])
    actual, expected = collate(heavy), run(repeated, [twice], twice.counts)
    assert actual.counts == twice.counts
    output = run(weighed, [actual], actual.counts)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert (gradients(weighed) - gradients(repeated)).norm() <= 1e-12 * gradients(repeated).norm()
    assert torch.allclose(output.metric_sums[:-1], expected.metric_sums[:-1], rtol=1e-12)
    # a pair's own, whatever it weighs
    assert torch.allclose(output.losses, expected.losses[:6], rtol=1e-12)
    assert output.metric_sums[-1, 0].item() == actual.sequence_tokens.sum().item()
    # only their ratios count, also below 1
    third = actual._replace(pair_weights=actual.pair_weights / 3)
    assert run(weighed, [third], third.counts).loss.item() == pytest.approx(
        expected.loss.item(), rel=1e-12
    )
    assert metrics(run(weighed, [third], third.counts)) == pytest.approx(metrics(output), rel=1e-12)


@both_layouts
def test_a_filler_alone_has_a_gradient_of_zeros(packed: bool) -> None:
    step = made_step()
    output = run(step, [pair_batch(2, is_filler=True, packed=packed)])
    assert output.loss.item() == 0.0
    assert torch.count_nonzero(gradients(step)) == 0
    # collectives need every one
    assert len(gradients(step)) == sum(p.numel() for p in step.parameters())
    assert set(metrics(output).values()) == {0.0}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
@both_layouts
@pytest.mark.parametrize("token_metrics", [True, False])
def test_policy_equal_to_reference_gives_ln_2_and_zeros(
    dtype: torch.dtype, tolerance: float, packed: bool, token_metrics: bool
) -> None:
    step = made_step(reference_seed=0, dtype=dtype)
    step.token_metrics = token_metrics
    output = run(step, micro_batches([12], packed))
    actual = metrics(output)
    assert torch.equal(output.logps, output.ref_logps)
    assert output.loss.item() == pytest.approx(math.log(2), abs=tolerance)
    assert actual["loss"] == pytest.approx(math.log(2), abs=tolerance)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert actual[name] == 0.0, name


def test_ipo_begins_at_its_target() -> None:
    step = made_step(reference_seed=0, dpo=DpoSpec(loss_type="ipo", beta=0.25))
    assert run(step, micro_batches([5, 7])).loss.item() == pytest.approx(4.0, rel=1e-15)


@both_layouts
def test_metrics_equal_a_naive_computation(packed: bool) -> None:
    step = made_step()
    output = run(step, micro_batches([12], packed))
    [batch] = micro_batches([12], packed=False)
    chosen, rejected = (0.3 * (output.logps - output.ref_logps)).chunk(2)
    logits = step.policy(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask
    ).logits.detach()
    picked = logits.flatten(0, 1)[batch.completion_index]
    is_chosen = batch.completion_index < batch.input_ids.numel() // 2
    logp = picked.log_softmax(-1)
    top1 = (picked.argmax(-1) == batch.completion_labels).double()
    expected = {
        "loss": output.loss,
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": output.logps[:PAIRS].mean(),
        "logps/rejected": output.logps[PAIRS:].mean(),
        "logits/chosen": picked[is_chosen].mean(),
        "logits/rejected": picked[~is_chosen].mean(),
        "entropy": -(logp.exp() * logp).sum(-1).mean(),
        "mean_token_accuracy": top1[is_chosen].mean(),
        "num_tokens": batch.sequence_tokens.sum(),
    }
    assert tuple(expected) == METRICS
    assert metrics(output) == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-10
    )
    assert output.metric_sums[:, 1].tolist() == [PAIRS] * 7 + [
        int(is_chosen.sum()),
        int((~is_chosen).sum()),
        len(is_chosen),
        int(is_chosen.sum()),
        1,
    ]


def test_token_metrics_that_are_off_change_nothing_else() -> None:
    whole_step, bare_step = made_step(), made_step()
    bare_step.token_metrics = False
    whole, bare = run(whole_step, micro_batches([5, 7])), run(bare_step, micro_batches([5, 7]))
    expected = {name: value for name, value in metrics(whole).items() if name not in TOKEN_METRICS}
    assert metrics(bare) == expected
    assert len(expected) == len(METRICS) - len(TOKEN_METRICS)
    assert torch.equal(bare.loss, whole.loss)
    assert torch.equal(bare.logps, whole.logps)
    assert torch.equal(gradients(bare_step), gradients(whole_step))


def test_known_reference_log_probs_are_taken_instead_of_the_reference() -> None:
    step = made_step()
    [batch] = micro_batches([12])
    known = torch.linspace(-5, -1, 2 * PAIRS, dtype=torch.float64)
    step.reference = None
    assert torch.equal(step(batch._replace(ref_logps=known), COUNTS).ref_logps, known)


def test_the_reference_is_neither_trained_nor_saved_and_never_changes() -> None:
    step = made_step()
    before, policy_before = checksum(step.reference.model), checksum(step.policy)
    optimizer = torch.optim.AdamW(step.parameters(), lr=0.1)
    for _ in range(3):
        run(step, micro_batches([12]))
        optimizer.step()
        optimizer.zero_grad()
    own = {p.data_ptr() for p in step.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in step.reference.model.parameters())
    assert all(name.startswith("policy.") for name in step.state_dict())
    assert set(step.state_dict()) == {f"policy.{name}" for name in step.policy.state_dict()}
    assert all(p.grad is None for p in step.reference.model.parameters())
    assert checksum(step.reference.model) == before
    assert checksum(step.policy) != policy_before


def test_outputs_carry_no_graph_but_the_loss() -> None:
    output = made_step()(pair_batch(2, packed=True), COUNTS)
    assert output.loss.requires_grad
    assert not any(tensor.requires_grad for tensor in output[1:])
