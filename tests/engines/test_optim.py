"""Optimizers and schedules by name: what they do, and how a wrong name or argument is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.engines.optim import (
    ReadOnlyOptimizer,
    check_optim,
    optimizer_factory,
    param_groups,
    scheduler_factory,
)
from orchestrator.settings.spec import ELEMENTWISE_OPTIMIZERS, OptimizerSpec, SchedulerSpec, UserError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def optimizer(**settings: Any) -> torch.optim.Optimizer:
    return optimizer_factory(OptimizerSpec(**settings))(param_groups(Small(), 0.1))


def rates(spec: SchedulerSpec, steps: int, lr: float = 1.0) -> list[float]:
    """The learning rate of each step."""
    made = optimizer(name="torch.optim.SGD", lr=lr)
    schedule = scheduler_factory(spec, steps)(made)
    found = []
    for _ in range(steps):
        found.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return found


def test_matrices_are_decayed_and_norms_and_biases_are_not() -> None:
    module = Small()
    matrices, others = param_groups(module, 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(module.linear.weight)]
    assert {id(p) for p in others["params"]} == {id(module.linear.bias), id(module.norm.weight), id(module.norm.bias)}


def test_no_group_is_empty() -> None:
    assert [len(group["params"]) for group in param_groups(nn.Linear(3, 2, bias=False), 0.1)] == [1]


@pytest.mark.parametrize("name", ELEMENTWISE_OPTIMIZERS)
def test_every_optimizer_of_the_settings_exists_and_moves_weights(name: str) -> None:
    made = optimizer(name=f"torch.optim.{name}", lr=0.5)
    assert type(made).__name__ == name
    assert made.param_groups[0]["lr"] == 0.5
    before = [p.detach().clone() for group in made.param_groups for p in group["params"]]
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    made.step()
    assert not any(
        torch.equal(old, new)
        for old, new in zip(before, (p for group in made.param_groups for p in group["params"]), strict=True)
    )


def test_arguments_reach_the_optimizer_and_decay_its_groups() -> None:
    made = optimizer(name="torch.optim.AdamW", lr=1e-3, kwargs={"betas": [0.8, 0.9]})
    assert [tuple(group["betas"]) for group in made.param_groups] == [(0.8, 0.9)] * 2
    assert [group["weight_decay"] for group in made.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"name": "torch.optim.Nothing"}, "optimizer.name", "has no such name"),
        ({"kwargs": {"momentun": 0.9}, "name": "torch.optim.SGD"}, "optimizer.kwargs", "momentun"),
        ({"kwargs": {"momentum": -1}, "name": "torch.optim.SGD"}, "optimizer.kwargs", "Invalid momentum"),
    ],
)
def test_a_wrong_optimizer_is_refused_before_it_is_built(settings: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_optim(OptimizerSpec(**settings), SchedulerSpec())
    assert caught.value.key == key


def test_decay_where_the_optimizer_has_none_is_refused() -> None:
    assert optimizer(name="torch.optim.Rprop")
    with pytest.raises(UserError, match=r"optimizer.weight_decay = 0.1: .*has none"):
        check_optim(OptimizerSpec(name="torch.optim.Rprop", weight_decay=0.1), SchedulerSpec())  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t))),
        ("constant", lambda t: 1.0),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_named_schedules(name: str, expected: Callable[[float], float], warmup: int) -> None:
    found = rates(SchedulerSpec(name=name, warmup_steps=warmup), 20, lr=0.5)
    ramp = [0.5 * step / warmup for step in range(warmup)]
    after = [0.5 * expected(step / (20 - warmup)) for step in range(20 - warmup)]
    assert found == pytest.approx(ramp + after, abs=1e-12)


def test_a_schedule_of_torch() -> None:
    spec = SchedulerSpec(name="torch.optim.lr_scheduler.StepLR", kwargs={"step_size": 2, "gamma": 0.5})
    assert rates(spec, 6) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "kwargs", "key"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"step": 2}, "scheduler.kwargs"),
        ("torch.optim.lr_scheduler.StepLR", {}, "scheduler.kwargs"),
        ("torch.optim.lr_scheduler.NoLR", {}, "scheduler.name"),
    ],
)
def test_a_wrong_schedule_is_refused(name: str, kwargs: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optim(OptimizerSpec(), SchedulerSpec(name=name, kwargs=kwargs))  # pyright: ignore[reportCallIssue]
    assert caught.value.key == key


def test_callbacks_cannot_change_the_optimizer() -> None:
    made = optimizer(name="torch.optim.SGD", lr=0.5)
    seen = ReadOnlyOptimizer(made)
    assert [group["lr"] for group in seen.param_groups] == [0.5, 0.5]
    assert all("params" not in group for group in seen.param_groups)
    seen.param_groups[0]["lr"] = 9.0
    assert made.param_groups[0]["lr"] == 0.5
    assert not hasattr(seen, "step")
