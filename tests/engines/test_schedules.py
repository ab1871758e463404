"""Every schedule under an engine takes the steps of plain torch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import lr_scheduler
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from orchestrator.dpo.step import PairStep
from orchestrator.engines.build import engine_class
from orchestrator.engines.optim import (
    name_in_settings,
    optimizer_factory,
    param_groups,
    scheduler_factory,
)
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import (
    OptimizerSpec,
    SchedulerName,
    SchedulerSpec,
)
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpoint_writer import save
from support.optimizers import Small
from support.tiny_parts import ALONE, tiny_model

STEPS, PEAK = 9, 1e-2
SPECIFIC: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "inverse_sqrt": {"timescale": 3},
    "warmup_stable_decay": {"num_decay_steps": 3},
    "wsd": {"num_decay_steps": 3},
}
OF_TORCH: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2, "gamma": 0.1},
    "MultiStepLR": {"milestones": [2, 4, 4, 6], "gamma": 0.5},
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": STEPS},
    "PolynomialLR": {"total_iters": 6},
}
NOT_BY_NAME = {
    "LRScheduler",
    "ReduceLROnPlateau",
    "SequentialLR",
    "ChainedScheduler",
    "LambdaLR",
    "MultiplicativeLR",
}
SCHEDULES = [
    *(
        {"name": name, "warmup_steps": 2, "kwargs": SPECIFIC.get(name, {})}
        for name in get_args(SchedulerName)
    ),
    *(
        {"name": f"torch.optim.lr_scheduler.{name}", "kwargs": kwargs}
        for name, kwargs in OF_TORCH.items()
    ),
]


def plain_schedule(
    torch_optimizer: torch.optim.Optimizer, name: str, kwargs: dict[str, Any], warmup_steps: int = 0
) -> Any:
    """As a user of torch or transformers writes it."""
    if name.startswith("torch."):
        return getattr(lr_scheduler, name.rpartition(".")[2])(torch_optimizer, **kwargs)
    name = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}.get(name, name)
    return get_scheduler(name, torch_optimizer, warmup_steps, STEPS, kwargs)


def stepped(weights: list[nn.Parameter], update: Callable[[], Any], seed: int) -> None:
    """One update, by a gradient that is made up."""
    draw = torch.Generator().manual_seed(seed)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=draw)
    update()


def test_the_names_of_schedules_are_those_of_transformers_and_torch() -> None:
    of_transformers = {name.value for name in TYPE_TO_SCHEDULER_FUNCTION} - {
        "reduce_lr_on_plateau",
        "greedy",
    }
    assert set(get_args(SchedulerName)) - {"wsd"} == of_transformers
    assert set(lr_scheduler.__all__) - NOT_BY_NAME == set(OF_TORCH)


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda schedule: schedule["name"].rpartition(".")[2]
)
def test_every_schedule_under_an_engine_is_plain_torch(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    def built(seed: int) -> Any:
        dealt = EngineSpec()
        engine = engine_class(dealt)(dealt, ALONE, "fp32", None, 0.1)
        step = PairStep(tiny_model(seed), Reference(tiny_model(1)), DpoSpec())
        adamw = OptimizerSpec(lr=PEAK)
        engine.wrap(
            step, optimizer_factory(adamw), scheduler_factory(SchedulerSpec(**schedule), STEPS)
        )
        return engine

    policy = tiny_model(0)
    weights = [p for group in param_groups(policy, 0.1) for p in group["params"]]
    adamw = torch.optim.AdamW(param_groups(policy, 0.1), lr=PEAK, fused=True)
    plain, expected = plain_schedule(adamw, **schedule), []
    for number in range(STEPS):
        expected.append(adamw.param_groups[0]["lr"])
        stepped(weights, adamw.step, number)
        plain.step()
    assert len(set(expected)) > 1

    engine, actual = built(0), []
    for number in range(STEPS):
        if number == 3:  # a gradient that is not finite counts nowhere
            engine.trainable[0].grad = torch.full_like(engine.trainable[0], float("nan"))
            assert not bool(engine.grads_finite())
            assert engine.optimizer_step(apply=False).lr == expected[3]
        if number == 5:
            reader = Reader(
                save(tmp_path, 1, engine.iter_shards(), {"engine": engine.state()}, ALONE)
            )
            engine = built(2)
            engine.load_shards(reader.read, reader.keys)
            engine.set_state(reader.meta["engine"])
        in_order = [p for group in engine.optimizer.param_groups for p in group["params"]]
        stepped(in_order, engine.grads_finite, number)
        actual.append(engine.optimizer_step(apply=True).lr)
    assert actual == expected
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(in_order, weights, strict=True))


@pytest.fixture
def lone_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("lone_group")
def test_schedules_find_the_peak_and_the_momentum_of_a_sharded_optimizer() -> None:
    for schedule in SCHEDULES:
        sharded, whole = Small(), Small()
        make = optimizer_factory(OptimizerSpec(lr=PEAK))
        dealt = ZeroRedundancyOptimizer(param_groups(sharded, 0.1), optimizer_class=make)
        adamw = torch.optim.AdamW(param_groups(whole, 0.1), lr=PEAK, fused=True)
        ours, plain = (
            scheduler_factory(SchedulerSpec(**schedule), STEPS)(dealt),
            plain_schedule(adamw, **schedule),
        )
        for _ in range(STEPS):
            for each, after in ((dealt, ours), (adamw, plain)):
                each.step()
                after.step()
            seen = [
                [(group["lr"], tuple(group["betas"])) for group in each.param_groups]
                for each in (dealt, adamw)
            ]
            assert seen[0] == seen[1]
    assert name_in_settings(dealt) == "torch.optim.AdamW"
