"""Build optimizer and LR schedule, from settings or user functions, and check which optimizer state
can be resumed.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from orchestrator.callback_api import SchedulerType
from orchestrator.engines.base import (
    IMPLEMENTATIONS,
    OptimizerFactory,
    ParamGroups,
    SchedulerFactory,
)
from orchestrator.settings.counts import counted
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.optim import (
    OPTIMIZERS,
    OptimizerSpec,
    SchedulerSpec,
    check_optimizer,
    optimizer_kind,
)
from orchestrator.settings.run import RunSpec
from orchestrator.user_code import call_user_code, user_attribute, user_code

Optimizers = tuple[OptimizerFactory | None, SchedulerFactory | None]
"""A user's (parameter groups -> optimizer, optimizer -> schedule); None: use the settings."""

# errors that a library raises for wrong arguments
REFUSALS = (TypeError, ValueError, ArithmeticError, LookupError, NotImplementedError)
# arguments that other settings or this program pass
NOT_IN_KWARGS = {
    "params",
    "model_params",
    "lr",
    "weight_decay",
    "optimizer",
    "last_epoch",
    "num_warmup_steps",
    "num_training_steps",
}

# updated in one pass over the weights, without a temporary copy
FUSED = (torch.optim.Adam, torch.optim.AdamW)


def param_groups(module: nn.Module, weight_decay: float) -> ParamGroups:
    """Return the trainable parameters in groups: matrices with weight decay, norms and biases
    without. Empty groups are left out, because ZeRO-3 would drop them.
    """
    # ZeRO-3 replaces a sharded weight by an empty vector and keeps its shape in ds_shape
    trainable = [
        (p, len(getattr(p, "ds_shape", p.shape))) for p in module.parameters() if p.requires_grad
    ]
    groups: ParamGroups = [
        {"params": [p for p, ndim in trainable if ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p, ndim in trainable if ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def factories(
    spec: RunSpec,
    policy: nn.Module,
    total_steps: int,
    device: torch.device,
    optimizers: Optimizers | None = None,
) -> tuple[OptimizerFactory, SchedulerFactory]:
    """Return the factories of optimizer and schedule for an engine: the user's functions if given,
    else the settings'.

    Raises:
        UserError: the optimizer of the settings does not support this policy on this device.
    """
    make, schedule = optimizers or (None, None)
    if make is None:
        _check_matrices(spec.optimizer.name, policy)
    return (
        _optimizer_of(make, spec.engine) if make else optimizer_factory(spec.optimizer, device),
        _schedule_of(schedule, total_steps)
        if schedule
        else scheduler_factory(spec.scheduler, total_steps),
    )


# --- the settings ---------------------------------------------------------------------------------


def optimizer_factory(spec: OptimizerSpec, device: torch.device | None = None) -> OptimizerFactory:
    """Return a factory (parameter groups -> optimizer) for the optimizer of the settings.

    device: that of the parameters; None if it is not known yet.

    Raises:
        UserError: there is no such optimizer, it does not support the device, or it rejects a
            keyword argument.
    """
    if device is not None and device.type == "cpu" and spec.compiles_kernels:
        rule = "takes minutes to compile on a machine without a GPU"
        raise UserError("optimizer.name", spec.name, rule, "use torch.optim.AdamW")
    kind = _imported("optimizer.name", spec.name)

    def make(params: Any) -> Optimizer:
        groups = [dict(group) for group in params]
        if not _takes(kind, "weight_decay"):
            if spec.weight_decay:
                rule = f"{spec.name} does not support it"
                raise UserError("optimizer.weight_decay", spec.weight_decay, rule, "set it to 0")
            for group in groups:
                group.pop("weight_decay", None)
        is_fused = kind in FUSED and spec.kwargs.keys().isdisjoint(IMPLEMENTATIONS)
        fused = {"fused": True} if is_fused else {}
        with user_code("optimizer.name", spec.name, "when it is built"):
            try:
                optimizer = kind(groups, lr=spec.lr, **fused, **spec.kwargs)
            except REFUSALS as error:
                raise _refused("optimizer.kwargs", spec, error, kind) from None
        if ":" in spec.name:
            # the settings allow user code only with engines whose ranks hold whole parameters
            return _check_groups(optimizer, groups, "optimizer.name", paired=False)
        return optimizer

    return make


def scheduler_factory(spec: SchedulerSpec, total_steps: int) -> SchedulerFactory:
    """Return a factory (optimizer -> schedule) over `total_steps` optimizer steps that are not
    skipped.

    Raises:
        UserError: there is no such scheduler, or it rejects a keyword argument.
    """
    if spec.name.startswith("torch."):
        kind = _imported("scheduler.name", spec.name)
        build = partial(kind, **spec.kwargs)
    else:
        from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

        # plain constant has no warm-up
        alias = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}
        name = SchedulerType(alias.get(spec.name, spec.name))
        kind, warmup = TYPE_TO_SCHEDULER_FUNCTION[name], spec.warmup(total_steps)
        # polynomial divides by the steps after the warm-up, even if there are none
        length = max(total_steps, warmup + 1)
        options = dict(spec.kwargs)

        def build(optimizer: Optimizer) -> LRScheduler:
            return get_scheduler(name, optimizer, warmup, length, options)

    def make(optimizer: Optimizer) -> LRScheduler:
        try:
            schedule = build(_with_defaults(optimizer))
        except REFUSALS as error:
            raise _refused("scheduler.kwargs", spec, error, kind) from None
        return _long_enough(schedule, "scheduler.kwargs", total_steps)

    return make


def check_optim(optimizer: OptimizerSpec, scheduler: SchedulerSpec, total_steps: int = 1) -> None:
    """Build both for one parameter, to find a wrong name or argument before anything is loaded.

    total_steps: those of the run, if they are known already.

    Raises:
        UserError: a name or an argument is wrong; the error has the library's message.
    """
    lone = [{"params": [nn.Parameter(torch.zeros(1, 1))], "weight_decay": 0.0}]
    if optimizer.compiles_kernels:
        kind = _imported("optimizer.name", optimizer.name)
        try:
            inspect.signature(kind).bind(lone, lr=optimizer.lr, **optimizer.kwargs)
        except TypeError as error:
            raise _refused("optimizer.kwargs", optimizer, error, kind) from None
        built: Optimizer = torch.optim.AdamW(lone, lr=optimizer.lr)
    else:
        built = optimizer_factory(optimizer)(lone)
    scheduler_factory(scheduler, total_steps)(built)


def _check_matrices(name: str, policy: nn.Module) -> None:
    """Check that Muon has only 2-D weights: it raises for others, under ZeroRedundancyOptimizer on
    some ranks only.
    """
    others = [n for n, p in policy.named_parameters() if p.requires_grad and p.ndim != 2]
    if name == "torch.optim.Muon" and others:
        rule = (
            "works only on 2-D weights; not 2-D: "
            f"{counted(len(others), 'trainable parameter')} ({others[0]}, ...)"
        )
        raise UserError(
            "optimizer.name", name, rule, "set model.lora, whose weights are all 2-D, or use AdamW"
        )


def _imported(key: str, name: str) -> Any:
    """Import the class or function of a dotted name or module:attr."""
    if ":" in name:
        kind = user_attribute(key, name)
        if not callable(kind):
            raise UserError(key, name, "cannot be called", "name a class or a function")
        return kind
    home, _, last = name.rpartition(".")
    library = home.partition(".")[0]
    try:
        module = import_module(home)
    except ImportError as error:
        raise UserError(key, name, f"cannot be imported ({error})", f"install {library}") from None
    if not callable(kind := getattr(module, last, None)):
        classes = [other for other in dir(module) if other[0].isupper()]
        near = difflib.get_close_matches(last, classes, n=1)
        rule = f"{library} {import_module(library).__version__} has no such name"
        cure = f"did you mean {home}.{near[0]}?" if near else "check the spelling"
        raise UserError(key, name, rule, cure)
    return kind


def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(kind).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}


def _takes(kind: Any, name: str) -> bool:
    parameters = _parameters(kind)
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refused(
    key: str, spec: OptimizerSpec | SchedulerSpec, error: Exception, kind: Any
) -> UserError:
    """Return an error with a library's message about its arguments, and the arguments that it
    supports.
    """
    # the name in transformers' message
    message = str(error).replace("`lr_scheduler_kwargs`", "scheduler.kwargs")
    takes = [name for name in _parameters(kind) if name not in NOT_IN_KWARGS]
    cure = f"its arguments are {', '.join(takes)}" if takes else "see its arguments"
    return UserError(key, dict(spec.kwargs), f"{spec.name} rejects them: {message}", cure)


# --- the schedule ---------------------------------------------------------------------------------


def _with_defaults(optimizer: Optimizer) -> Optimizer:
    """Copy the optimizer's defaults to ZeroRedundancyOptimizer, which has none: some schedules read
    the peak or the momentum there.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        for key, value in optimizer.optim.defaults.items():
            optimizer.defaults.setdefault(key, value)
    return optimizer


def _long_enough(schedule: LRScheduler, key: str, total_steps: int) -> LRScheduler:
    """Check that a schedule with a last step covers the run: OneCycleLR raises at the step after
    it.
    """
    steps = getattr(schedule, "total_steps", total_steps)
    if steps < total_steps:
        rule = (
            f"{type(schedule).__name__} ends there, but the run has {counted(total_steps, 'step')}"
        )
        raise UserError(f"{key}.total_steps", steps, rule, f"set it to {total_steps} or more")
    return schedule


# --- a user's functions ---------------------------------------------------------------------------


def check_functions(optimizers: Optimizers | None) -> None:
    """Check that optimizers is a pair of functions, either of which may be None.

    Raises:
        UserError: it is not; a built optimizer cannot be sent to every rank, which has other
            parameters.
    """
    cure = "use (params -> optimizer, optimizer -> schedule), either of which may be None"
    if optimizers is None:
        return
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise UserError("optimizers", type(optimizers).__name__, "is not a pair of functions", cure)
    for function in optimizers:
        if not (function is None or callable(function)):
            rule = "must be a function: each rank builds its own optimizer for its own parameters"
            raise UserError("optimizers", type(function).__name__, rule, cure)


def check_built(built: Any, groups: ParamGroups, engine: EngineSpec) -> Optimizer:
    """Check the optimizer that a user's function built for these groups, and return it.

    Raises:
        UserError: it is not an optimizer, or the engine does not support it, or it has other
            parameters.
    """
    if isinstance(built, Optimizer):
        check_optimizer("optimizers", name_in_settings(built), engine)
    # ZeroRedundancyOptimizer pairs its groups with those passed to it, in order
    return _check_groups(built, groups, "optimizers", paired=engine.deals_parameters)


def _check_groups(built: Any, groups: ParamGroups, key: str, paired: bool) -> Optimizer:
    """Check that an optimizer holds the parameters of these groups, and if `paired` the groups."""
    if not isinstance(built, Optimizer):
        cure = "return a torch.optim.Optimizer for the parameters it is called with"
        raise UserError(key, type(built).__name__, "is not a torch optimizer", cure)
    expected, actual = (
        [[id(p) for p in group["params"]] for group in each]
        for each in (groups, built.param_groups)
    )
    flat = [sorted(chain.from_iterable(each)) for each in (expected, actual)]
    if flat[0] != flat[1] or (paired and expected != actual):
        rule = f"holds other parameter groups than the {len(expected)} it was called with"
        cure = "pass them on unchanged, for example torch.optim.SGD(params, lr=1e-3)"
        raise UserError(key, name_in_settings(built), rule, cure)
    return built


def _optimizer_of(function: OptimizerFactory, engine: EngineSpec) -> OptimizerFactory:
    def make(params: Any) -> Optimizer:
        groups = [dict(group) for group in params]
        return check_built(_result(function, groups), groups, engine)

    return make


def _schedule_of(function: SchedulerFactory, total_steps: int) -> SchedulerFactory:
    def make(optimizer: Optimizer) -> LRScheduler:
        schedule = _result(function, _with_defaults(optimizer))
        if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
            rule = "is not a torch schedule that depends only on the step"
            cure = "return a torch.optim.lr_scheduler.LRScheduler"
            raise UserError("optimizers", type(schedule).__name__, rule, cure)
        return _long_enough(schedule, "optimizers", total_steps)

    return make


def _result(function: Callable[[Any], Any], argument: Any) -> Any:
    """Return the result of a user's function."""
    name = getattr(function, "__name__", type(function).__name__)
    return call_user_code("optimizers", name, "when it is built", function, argument)


# --- resuming from a checkpoint -------------------------------------------------------------------


def name_in_settings(built: Optimizer | LRScheduler) -> str:
    """Return its name as in the settings: dotted for the libraries in OPTIMIZERS and torch, else
    module:attr.
    """
    kind = type(built.optim if isinstance(built, ZeroRedundancyOptimizer) else built)
    for home in ("torch.optim.lr_scheduler", *OPTIMIZERS):
        if f"{kind.__module__}.".startswith(f"{home}."):
            return f"{home}.{kind.__name__}"
    return f"{kind.__module__}:{kind.__qualname__}"


def made_by(
    optimizer: Optimizer, scheduler: LRScheduler, engine: EngineSpec, world_size: int
) -> dict[str, Any]:
    """Return what a checkpoint stores about the origin of its optimizer state, for
    `check_resumable`.
    """
    names = {"optimizer": name_in_settings(optimizer), "scheduler": name_in_settings(scheduler)}
    return {**names, "engine": engine.kind, "world_size": world_size}


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run can resume from optimizer state, each described by `made_by`. Elementwise
    optimizers can resume on every engine and world size.

    Raises:
        UserError: another optimizer or schedule, which only a user's function can cause, or another
            engine or world size for an optimizer whose state cannot be resharded.
    """
    for key in ("optimizer", "scheduler"):
        if before[key] != now[key]:
            cure = "use the same optimizers=(...) to resume it, or choose another run.name"
            raise UserError(key, now[key], f"the run was started with {before[key]}", cure)
    if optimizer_kind(now["optimizer"]) == "elementwise":
        return
    for key, setting in (("engine", "engine.kind"), ("world_size", "cluster.num_workers")):
        if before[key] != now[key]:
            rule = (
                f"the state of {now['optimizer']} is not elementwise, and the run's was "
                f"written with {before[key]}"
            )
            cure = f"set {setting}={before[key]} to resume it, or choose another run.name"
            raise UserError(setting, now[key], rule, cure)


class ReadOnlyOptimizer:
    """A read-only view of the optimizer's hyperparameters for callbacks: a change on one rank makes
    ranks differ.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[Mapping[str, Any]]:
        """Return a read-only copy of each group's hyperparameters, without its parameters.

        It raises on a change, which would have no effect.
        """
        groups = (
            {k: v for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        )
        return [MappingProxyType(group) for group in groups]
