"""Optimizers and schedules, by name and by function: what they do, and how a wrong one is
refused.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.engines.optim import (
    check_optim,
    factories,
    name_in_settings,
    optimizer_factory,
    param_groups,
    scheduler_factory,
)
from orchestrator.settings.errors import UserError
from orchestrator.settings.optim import (
    ELEMENTWISE_OPTIMIZERS,
    OPTIMIZERS,
    OptimizerSpec,
    SchedulerSpec,
)
from support.optimizers import Small, optimizer
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec


def rates(spec: SchedulerSpec, steps: int, lr: float = 1.0) -> list[float]:
    """The learning rate of each step."""
    torch_optimizer = optimizer(name="torch.optim.SGD", lr=lr)
    schedule = scheduler_factory(spec, steps)(torch_optimizer)
    values = []
    for _ in range(steps):
        values.append(torch_optimizer.param_groups[0]["lr"])
        torch_optimizer.step()
        schedule.step()
    return values


def test_matrices_are_decayed_and_norms_and_biases_are_not() -> None:
    module = Small()
    matrices, others = param_groups(module, 0.1)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(module.linear.weight)]
    assert {id(p) for p in others["params"]} == {
        id(module.linear.bias),
        id(module.norm.weight),
        id(module.norm.bias),
    }


def test_no_group_is_empty() -> None:
    assert [len(group["params"]) for group in param_groups(nn.Linear(3, 2, bias=False), 0.1)] == [1]


@pytest.mark.parametrize("name", ELEMENTWISE_OPTIMIZERS)
def test_every_optimizer_of_the_settings_exists_and_moves_weights(name: str) -> None:
    torch_optimizer = optimizer(name=f"torch.optim.{name}", lr=0.5)
    assert type(torch_optimizer).__name__ == name
    assert torch_optimizer.param_groups[0]["lr"] == 0.5
    before = [p.detach().clone() for group in torch_optimizer.param_groups for p in group["params"]]
    for group in torch_optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    torch_optimizer.step()
    assert not any(
        torch.equal(old, new)
        for old, new in zip(
            before,
            (p for group in torch_optimizer.param_groups for p in group["params"]),
            strict=True,
        )
    )


def test_adam_is_fused_unless_the_settings_say_how_it_computes() -> None:
    assert all(group["fused"] for group in optimizer(name="torch.optim.AdamW").param_groups)
    foreach = optimizer(name="torch.optim.AdamW", kwargs={"foreach": True})
    assert not any(group["fused"] for group in foreach.param_groups)


def test_arguments_reach_the_optimizer_and_decay_its_groups() -> None:
    torch_optimizer = optimizer(name="torch.optim.AdamW", lr=1e-3, kwargs={"betas": [0.8, 0.9]})
    assert [tuple(group["betas"]) for group in torch_optimizer.param_groups] == [(0.8, 0.9)] * 2
    assert [group["weight_decay"] for group in torch_optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"name": "torch.optim.Nothing"}, "optimizer.name", "has no such name"),
        ({"kwargs": {"momentun": 0.9}, "name": "torch.optim.SGD"}, "optimizer.kwargs", "momentun"),
        (
            {"kwargs": {"momentum": -1}, "name": "torch.optim.SGD"},
            "optimizer.kwargs",
            "Invalid momentum",
        ),
        (
            {"kwargs": {"betta": 1}, "name": "bitsandbytes.optim.AdamW8bit"},
            "optimizer.kwargs",
            "betta.*are betas, eps",
        ),
        (
            {"kwargs": {"betta": 1}, "name": "deepspeed.ops.adam.FusedAdam"},
            "optimizer.kwargs",
            "betta.*bias_correc",
        ),
        ({"name": "math:pi"}, "optimizer.name", "cannot be called"),
        ({"name": "math:tau_"}, "optimizer.name", "module math has no tau_"),
        ({"name": "builtins:dict"}, "optimizer.kwargs", "see its arguments"),
    ],
)
def test_a_wrong_optimizer_is_refused_before_it_is_built(
    settings: dict[str, Any], key: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_optim(OptimizerSpec(**settings), SchedulerSpec())
    assert caught.value.key == key


def test_decay_where_the_optimizer_has_none_is_refused() -> None:
    assert optimizer(name="torch.optim.Rprop")
    with pytest.raises(UserError, match=r"optimizer.weight_decay = 0.1: .*does not support it"):
        check_optim(OptimizerSpec(name="torch.optim.Rprop", weight_decay=0.1), SchedulerSpec())


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
    actual = rates(SchedulerSpec(name=name, warmup_steps=warmup), 20, lr=0.5)
    ramp = [0.5 * step / warmup for step in range(warmup)]
    after = [0.5 * expected(step / (20 - warmup)) for step in range(20 - warmup)]
    assert actual == pytest.approx(ramp + after, abs=1e-12)


def test_a_schedule_of_torch() -> None:
    spec = SchedulerSpec(
        name="torch.optim.lr_scheduler.StepLR", kwargs={"step_size": 2, "gamma": 0.5}
    )
    assert rates(spec, 6) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "kwargs", "key"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"step": 2}, "scheduler.kwargs"),
        ("torch.optim.lr_scheduler.StepLR", {}, "scheduler.kwargs"),
        ("torch.optim.lr_scheduler.NoLR", {}, "scheduler.name"),
        ("torch.optim.lr_scheduler.LRScheduler", {}, "scheduler.kwargs"),
        ("cosine", {"cycles": 2}, "scheduler.kwargs"),
        ("cosine_with_min_lr", {}, "scheduler.kwargs"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "scheduler.kwargs"),
        ("wsd", {}, "scheduler.kwargs"),
        ("wsd", {"num_decay_steps": 2, "decay_type": "sqrt"}, "scheduler.kwargs"),
        ("inverse_sqrt", {"timescale": 0}, "scheduler.kwargs"),
        ("polynomial", {"lr_end": 1.0}, "scheduler.kwargs"),
    ],
)
def test_a_wrong_schedule_is_refused(name: str, kwargs: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optim(OptimizerSpec(), SchedulerSpec(name=name, kwargs=kwargs))
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_a_schedule_that_ends_before_the_run_is_refused() -> None:
    spec = SchedulerSpec(
        name="torch.optim.lr_scheduler.OneCycleLR", kwargs={"max_lr": 1.0, "total_steps": 9}
    )
    with pytest.raises(
        UserError, match=r"scheduler.kwargs.total_steps = 9: .*the run has 10 steps; set it to 10"
    ):
        scheduler_factory(spec, 10)(optimizer(name="torch.optim.AdamW"))
    assert scheduler_factory(spec, 9)(optimizer(name="torch.optim.AdamW"))


# --- optimizers that are not elementwise ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.Adafactor",
        *map("bitsandbytes.optim.{}".format, OPTIMIZERS["bitsandbytes.optim"]),
    ],
)
def test_an_optimizer_of_whole_parameters_moves_weights(name: str) -> None:
    weight = nn.Parameter(torch.ones(80, 80))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    check_optim(OptimizerSpec(name=name), SchedulerSpec())
    torch_optimizer = optimizer_factory(OptimizerSpec(name=name, lr=1e-2))(groups)
    weight.grad = torch.randn(80, 80)
    torch_optimizer.step()
    assert not torch.equal(weight, torch.ones(80, 80))
    assert torch_optimizer.param_groups[0]["weight_decay"] == 0.1
    assert name_in_settings(torch_optimizer) == name


def test_muon_refuses_weights_that_are_not_2d(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, optimizer={"name": "torch.optim.Muon"})
    check_optim(spec.optimizer, spec.scheduler)
    with pytest.raises(
        UserError, match=r"Muon': .*[0-9]+ trainable parameters? \(linear.bias.*model.lora"
    ):
        factories(spec, Small(), 4, ALONE.device)
    matrices = nn.Linear(3, 2, bias=False)
    make, _ = factories(spec, matrices, 4, ALONE.device)
    assert name_in_settings(make(param_groups(matrices, 0.1))) == "torch.optim.Muon"


def test_deepspeeds_own_are_not_compiled_on_a_cpu(tmp_path: Path) -> None:
    for name, offload in zip(OPTIMIZERS["deepspeed.ops.adam"], ("none", "optimizer"), strict=True):
        engine = {"kind": "deepspeed", "offload": offload}
        spec = tiny_spec(tmp_path, engine=engine, optimizer={"name": f"deepspeed.ops.adam.{name}"})
        check_optim(spec.optimizer, spec.scheduler)
        with pytest.raises(
            UserError,
            match=f"optimizer.name = .*{name}': takes minutes to compile.*torch.optim.AdamW",
        ):
            factories(spec, Small(), 4, ALONE.device)
