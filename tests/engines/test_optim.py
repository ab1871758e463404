"""Optimizers and schedules, by name and by function: what they do, and how a wrong one is
refused.
"""

import math
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
    ReadOnlyOptimizer,
    check_built,
    check_functions,
    check_optim,
    check_resumable,
    factories,
    made_by,
    name_of,
    optimizer_factory,
    param_groups,
    scheduler_factory,
)
from orchestrator.models.reference import Reference
from orchestrator.run.local.debug import debug
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import (
    ELEMENTWISE_OPTIMIZERS,
    OPTIMIZERS,
    OptimizerSpec,
    SchedulerName,
    SchedulerSpec,
)
from orchestrator.training.checkpoint import Reader, save
from support.run_files import losses
from support.tiny_parts import ALONE, tiny_model
from support.tiny_settings import tiny_spec


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
    built = optimizer(name="torch.optim.SGD", lr=lr)
    schedule = scheduler_factory(spec, steps)(built)
    values = []
    for _ in range(steps):
        values.append(built.param_groups[0]["lr"])
        built.step()
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
    built = optimizer(name=f"torch.optim.{name}", lr=0.5)
    assert type(built).__name__ == name
    assert built.param_groups[0]["lr"] == 0.5
    before = [p.detach().clone() for group in built.param_groups for p in group["params"]]
    for group in built.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    built.step()
    assert not any(
        torch.equal(old, new)
        for old, new in zip(
            before, (p for group in built.param_groups for p in group["params"]), strict=True
        )
    )


def test_adam_is_fused_unless_the_settings_say_how_it_computes() -> None:
    assert all(group["fused"] for group in optimizer(name="torch.optim.AdamW").param_groups)
    foreach = optimizer(name="torch.optim.AdamW", kwargs={"foreach": True})
    assert not any(group["fused"] for group in foreach.param_groups)


def test_arguments_reach_the_optimizer_and_decay_its_groups() -> None:
    built = optimizer(name="torch.optim.AdamW", lr=1e-3, kwargs={"betas": [0.8, 0.9]})
    assert [tuple(group["betas"]) for group in built.param_groups] == [(0.8, 0.9)] * 2
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]


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


# --- every schedule under an engine ---------------------------------------------------------------

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
    built: torch.optim.Optimizer, name: str, kwargs: dict[str, Any], warmup_steps: int = 0
) -> Any:
    """As a user of torch or transformers writes it."""
    if name.startswith("torch."):
        return getattr(lr_scheduler, name.rpartition(".")[2])(built, **kwargs)
    name = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}.get(name, name)
    return get_scheduler(name, built, warmup_steps, STEPS, kwargs)


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
    assert name_of(dealt) == "torch.optim.AdamW"


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
    built = optimizer_factory(OptimizerSpec(name=name, lr=1e-2))(groups)
    weight.grad = torch.randn(80, 80)
    built.step()
    assert not torch.equal(weight, torch.ones(80, 80))
    assert built.param_groups[0]["weight_decay"] == 0.1
    assert name_of(built) == name


def test_muon_refuses_weights_that_are_not_2d(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, optimizer={"name": "torch.optim.Muon"})
    check_optim(spec.optimizer, spec.scheduler)
    with pytest.raises(
        UserError, match=r"Muon': .*[0-9]+ trainable parameters? \(linear.bias.*model.lora"
    ):
        factories(spec, Small(), 4, ALONE.device)
    matrices = nn.Linear(3, 2, bias=False)
    make, _ = factories(spec, matrices, 4, ALONE.device)
    assert name_of(make(param_groups(matrices, 0.1))) == "torch.optim.Muon"


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


# --- a Python user's own --------------------------------------------------------------------------

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
        (Mine, DEALT, "test_optim:Mine.*set engine.kind=ddp and engine.shard_optimizer=false"),
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
        ((None, lambda built: lr_scheduler.StepLR(built, 30)), 0.5, torch.optim.AdamW),
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
            lambda built: lr_scheduler.StepLR(built, 2, 0.1),
        ),
    )
    assert losses(by_function.run_dir) == losses(by_name.run_dir)
    assert len(set(losses(by_name.run_dir).values())) == 4


# --- what goes on from a checkpoint ---------------------------------------------------------------


def test_optimizer_state_that_is_not_elementwise_stays_on_its_rank() -> None:
    adamw, adafactor = optimizer(name="torch.optim.AdamW"), optimizer(name="torch.optim.Adafactor")
    steady = [lr_scheduler.StepLR(built, 30) for built in (adamw, adafactor)]
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
    built = optimizer(name="torch.optim.SGD", lr=0.5)
    seen = ReadOnlyOptimizer(built)
    assert [group["lr"] for group in seen.param_groups] == [0.5, 0.5]
    assert all("params" not in group for group in seen.param_groups)
    with pytest.raises(TypeError, match="does not support item assignment"):
        seen.param_groups[0]["lr"] = 9.0
    assert built.param_groups[0]["lr"] == 0.5
    assert not hasattr(seen, "step")
