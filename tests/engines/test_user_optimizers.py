"""Optimizers and schedules of a Python user, and the state that they resume from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from transformers import get_scheduler

from orchestrator.engines.optim import (
    ReadOnlyOptimizer,
    check_built,
    check_functions,
    check_resumable,
    factories,
    made_by,
    param_groups,
)
from orchestrator.run.local.debug import debug
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from support.optimizers import Small, optimizer
from support.run_files import losses
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec

WHOLE = EngineSpec(shard_optimizer=False)
DEALT, ZERO = EngineSpec(), EngineSpec(kind="deepspeed")


class Mine(torch.optim.SGD):
    """Code of a user's, whatever it derives from."""


def flat(params: Any) -> list[nn.Parameter]:
    return [p for group in params for p in group["params"]]


@pytest.mark.parametrize(
    "optimizers",
    [
        torch.optim.SGD,
        (torch.optim.SGD,),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), None),
        (None, lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 30)),
    ],
    ids=["one", "tuple-of-one", "optimizer", "schedule"],
)
def test_optimizers_must_be_a_pair_of_functions(optimizers: Any, tmp_path: Path) -> None:
    for refuses in (check_functions, lambda value: debug(tiny_spec(tmp_path), optimizers=value)):
        with pytest.raises(
            UserError, match=r"optimizers = .*; use \(params -> optimizer, optimizer -> schedule\)"
        ):
            refuses(optimizers)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "engine", "words"),
    [
        (torch.optim.SGD, ZERO, ""),
        (torch.optim.Adafactor, DEALT, ""),
        (torch.optim.Adafactor, ZERO, "torch.optim.Adafactor.*deepspeed flattens into one vector"),
        (
            lambda params: torch.optim.LBFGS(flat(params)),
            WHOLE,
            "torch.optim.LBFGS.*needs a closure",
        ),
        (Mine, WHOLE, ""),
        (
            Mine,
            DEALT,
            "test_user_optimizers:Mine.*set engine.kind=ddp and engine.shard_optimizer=false",
        ),
        (lambda params: None, DEALT, "NoneType.*is not a torch optimizer"),
        (lambda params: torch.optim.SGD(flat(params)), WHOLE, ""),
        (
            lambda params: torch.optim.SGD(flat(params)),
            DEALT,
            "other parameter groups than the 2.*unchanged",
        ),
        (lambda params: torch.optim.SGD(flat(params)[:1]), WHOLE, "other parameter groups"),
    ],
)
def test_a_users_optimizer_needs_an_engine_that_keeps_its_maths(
    make: Any, engine: EngineSpec, words: str
) -> None:
    groups = param_groups(Small(), 0.1)
    actual = make([dict(group) for group in groups])
    if not words:
        assert check_built(actual, groups, engine) is actual
        return
    with pytest.raises(UserError, match=words) as caught:
        check_built(actual, groups, engine)
    assert caught.value.key == "optimizers"


@pytest.mark.parametrize(
    ("optimizers", "words"),
    [
        ((lambda params: {}["lr"], None), "'<lambda>': raised KeyError: 'lr'"),
        ((None, lambda made: None), "'NoneType': is not a torch schedule"),
        (
            (None, lr_scheduler.ReduceLROnPlateau),
            "'ReduceLROnPlateau': is not a torch schedule that depends only on",
        ),
        (
            (None, lambda made: lr_scheduler.OneCycleLR(made, 1.0, 3)),
            "total_steps = 3: OneCycleLR ends there",
        ),
    ],
)
def test_errors_of_a_users_optimizer_function_are_one_line(
    optimizers: Any, words: str, tmp_path: Path
) -> None:
    make, schedule = factories(tiny_spec(tmp_path), Small(), 4, ALONE.device, optimizers)
    with pytest.raises(UserError, match=words):
        schedule(make(param_groups(Small(), 0.1)))


def test_settings_apply_where_a_function_is_none(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, optimizer={"lr": 0.5}, scheduler={"name": "constant"})
    for optimizers, lr, kind in (
        ((lambda params: torch.optim.SGD(params, lr=0.25), None), 0.25, torch.optim.SGD),
        ((None, lambda optimizer: lr_scheduler.StepLR(optimizer, 30)), 0.5, torch.optim.AdamW),
        (None, 0.5, torch.optim.AdamW),
    ):
        make, schedule = factories(spec, Small(), 4, ALONE.device, optimizers)
        actual = make(param_groups(Small(), 0.1))
        assert type(actual) is kind
        assert [(group["lr"], group["weight_decay"]) for group in actual.param_groups] == [
            (lr, 0.1),
            (lr, 0.0),
        ]
        assert isinstance(schedule(actual), lr_scheduler.StepLR) is bool(
            optimizers and optimizers[1]
        )


def test_a_run_with_functions_is_the_run_of_the_settings_that_say_the_same(tmp_path: Path) -> None:
    optimizer = {
        "name": "torch.optim.SGD",
        "lr": 0.5,
        "weight_decay": 0.1,
        "kwargs": {"momentum": 0.9},
    }
    schedule = {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 2, "gamma": 0.1}}
    by_name = tiny_spec(tmp_path, run={"name": "by-name"}, optimizer=optimizer, scheduler=schedule)
    by_function = tiny_spec(tmp_path, run={"name": "by-function"}, optimizer={"weight_decay": 0.1})
    debug(by_name)
    debug(
        by_function,
        optimizers=(
            lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
            lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.1),
        ),
    )
    assert losses(by_function.run_dir) == losses(by_name.run_dir)
    assert len(set(losses(by_name.run_dir).values())) == 4


def test_optimizer_state_that_is_not_elementwise_stays_on_its_rank() -> None:
    adamw, adafactor = optimizer(name="torch.optim.AdamW"), optimizer(name="torch.optim.Adafactor")
    steady = [lr_scheduler.StepLR(each, 30) for each in (adamw, adafactor)]
    check_resumable(made_by(adamw, steady[0], ZERO, 2), made_by(adamw, steady[0], DEALT, 3))
    before = made_by(adafactor, steady[1], DEALT, 2)
    check_resumable(before, made_by(adafactor, steady[1], DEALT, 2))
    message = (
        "cluster.num_workers = 3: the state of torch.optim.Adafactor is not elementwise, "
        ".*written with 2; set clu.*=2"
    )
    with pytest.raises(UserError, match=message):
        check_resumable(before, made_by(adafactor, steady[1], DEALT, 3))
    with pytest.raises(
        UserError, match=r"engine.kind = 'deepspeed': .*written with ddp; set engine.kind=ddp"
    ):
        check_resumable(before, made_by(adafactor, steady[1], ZERO, 2))
    with pytest.raises(
        UserError,
        match=r"optimizer = 'torch.optim.AdamW': the run was started with torch.*Adafactor",
    ):
        check_resumable(before, made_by(adamw, steady[0], DEALT, 2))
    cosine = get_scheduler("cosine", adafactor, 0, 4)
    with pytest.raises(
        UserError, match=r"scheduler = .*LambdaLR': the run was started with .*StepLR; use the same"
    ):
        check_resumable(before, made_by(adafactor, cosine, DEALT, 2))


def test_callbacks_cannot_change_the_optimizer() -> None:
    torch_optimizer = optimizer(name="torch.optim.SGD", lr=0.5)
    seen = ReadOnlyOptimizer(torch_optimizer)
    assert [group["lr"] for group in seen.param_groups] == [0.5, 0.5]
    assert all("params" not in group for group in seen.param_groups)
    with pytest.raises(TypeError, match="does not support item assignment"):
        seen.param_groups[0]["lr"] = 9.0
    assert torch_optimizer.param_groups[0]["lr"] == 0.5
    assert not hasattr(seen, "step")
