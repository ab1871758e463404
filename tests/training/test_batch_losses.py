"""Losses over the whole global batch have the gradient of their formula, however the batch is dealt
and cut.
"""

from typing import Any

import pytest
import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec
from orchestrator.training.batch_losses import first_pass
from orchestrator.world import World
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE, both_layouts, collator, pair_rows, tiny_model

PAIRS, BETA = 7, 0.3
DPO = DpoSpec(loss_type=["aot", "sigmoid", "aot_unpaired"], loss_weights=[1, 0.5, 2], beta=BETA)
COUNTS = Counts(PAIRS, 1)
CUTS = {  # the pairs of each micro-batch of each rank; none: a filler
    "whole": [[[0, 1, 2, 3, 4, 5, 6]]],
    "one by one": [[[6], [3], [5], [0], [2], [4], [1]]],
    "2 ranks": [[[5, 1], [0, 6]], [[3], [2, 4]]],
    "3 ranks, of which one is idle": [[[4, 0, 2]], [[]], [[6, 5, 1, 3]]],
}


def made_engine() -> DdpEngine:
    ddp = DdpEngine(EngineSpec(), ALONE, "fp64", None, 0.0)
    policy, judge = tiny_model(0, torch.float64, True), tiny_model(1, torch.float64, True)
    optimizer, schedule = OptimizerSpec(), SchedulerSpec()
    factories = optimizer_factory(optimizer), scheduler_factory(schedule, 1)
    ddp.wrap(PairStep(policy, Reference(judge), DPO), *factories)
    return ddp


def sequence_logps(model: Any) -> torch.Tensor:
    """[2, B] from the model's own logits, one sequence at a time."""
    values: list[torch.Tensor] = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in pair_rows(PAIRS):
            ids, start = torch.tensor(row["prompt_ids"] + row[side]), len(row["prompt_ids"])
            log_probs = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
            values.append(log_probs.gather(1, ids[start:, None]).sum())
    return torch.stack(values).view(2, -1)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def expected() -> tuple[float, torch.Tensor]:
    """Loss and gradient, by autograd through the sorting."""
    policy = tiny_model(0, torch.float64)
    (w, x), (ref_w, ref_x) = (
        sequence_logps(policy),
        sequence_logps(tiny_model(1, torch.float64)).detach(),
    )
    margins = [
        (w - x).sort().values - (ref_w - ref_x).sort().values,
        (w - ref_w) - (x - ref_x),
        (w - ref_w).sort().values - (x - ref_x).sort().values,
    ]
    weighted = zip(DPO.weights, margins, strict=True)
    loss = sum(
        (-factor * (BETA * m).sigmoid().log().mean() for factor, m in weighted), torch.zeros(())
    )
    loss.backward()
    return loss.item(), gradient(policy)


def batch(pairs: list[int], packed: bool) -> PairBatch:
    rows = pair_rows(PAIRS)
    return collator(packed)([rows[i] for i in pairs or [0]], is_filler=not pairs)


@both_layouts
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_are_those_of_the_sorted_global_batch(
    expected: tuple[float, torch.Tensor], cut: str, packed: bool
) -> None:
    ranks = CUTS[cut]
    engines = [made_engine() for _ in ranks]
    values = [0] * len(ranks)

    def step(world: World) -> tuple[float, float, torch.Tensor]:
        engine = engines[world.rank]
        ask = engine.step.reference_logps

        def counted(*args: Any) -> torch.Tensor:
            values[world.rank] += 1
            return ask(*args)

        engine.step.reference_logps = counted
        batches = first_pass(
            engine, [batch(pairs, packed) for pairs in ranks[world.rank]], COUNTS, DPO, world
        )
        outputs = [
            engine.micro_step(each, COUNTS, last=i == len(batches) - 1)
            for i, each in enumerate(batches)
        ]
        by_pair = sum(
            float(output.losses @ each.pair_weights)
            for output, each in zip(outputs, batches, strict=True)
        )
        logged = sum(float(output.metric_sums[0, 0]) for output in outputs)
        assert logged == pytest.approx(by_pair, rel=1e-12)
        return sum(float(output.loss) for output in outputs), by_pair / PAIRS, gradient(engine.step)

    by_rank = on_ranks(len(ranks), step)
    for total in (sum(loss for loss, _, _ in by_rank), sum(by_pair for _, by_pair, _ in by_rank)):
        assert total == pytest.approx(expected[0], rel=1e-12)
    assert (sum(slopes for *_, slopes in by_rank) - expected[1]).norm() <= 1e-11 * expected[
        1
    ].norm()
    # the reference runs in the first pass alone
    assert values == [len(micro_batches) for micro_batches in ranks]
