"""Settings -> optimizer and learning-rate schedule, by name."""

import inspect
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.engines.base import OptimizerFactory, ParamGroups, SchedulerFactory
from orchestrator.settings.spec import OptimizerSpec, SchedulerSpec, UserError


def param_groups(module: nn.Module, weight_decay: float) -> ParamGroups:
    """Trainable parameters, matrices decayed, norms and biases not; no empty group (ZeRO-3 would drop it)."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: ParamGroups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_factory(spec: OptimizerSpec) -> OptimizerFactory:
    """parameters or groups -> the optimizer that the settings name.

    Raises:
        UserError: torch has no such optimizer, or it refuses a keyword argument.
    """
    kind = _of_torch("optimizer.name", spec.name)

    def make(params: Any) -> Optimizer:
        groups = [dict(group) for group in params]
        if "weight_decay" not in inspect.signature(kind).parameters:
            if spec.weight_decay:
                raise UserError("optimizer.weight_decay", spec.weight_decay, f"{spec.name} has none", "set it to 0")
            for group in groups:
                group.pop("weight_decay", None)
        try:
            return kind(groups, lr=spec.lr, **spec.kwargs)
        except (TypeError, ValueError) as error:
            raise UserError(
                "optimizer.kwargs", dict(spec.kwargs), f"{spec.name} says: {error}", "see that optimizer's arguments"
            ) from None

    return make


def check_optim(optimizer: OptimizerSpec, scheduler: SchedulerSpec) -> None:
    """Try both on one parameter, so that a wrong name or argument is refused before anything is loaded.

    Raises:
        UserError: which argument, in torch's words.
    """
    lone = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": 0.0}]
    scheduler_factory(scheduler, 1)(optimizer_factory(optimizer)(lone))


def scheduler_factory(spec: SchedulerSpec, total_steps: int) -> SchedulerFactory:
    """optimizer -> its schedule over `total_steps` optimizer steps actually taken.

    Raises:
        UserError: torch has no such scheduler, or it refuses a keyword argument.
    """
    if spec.name.startswith("torch."):
        kind = _of_torch("scheduler.name", spec.name)

        def make(optimizer: Optimizer) -> LRScheduler:
            try:
                return kind(optimizer, **spec.kwargs)
            except (TypeError, ValueError) as error:
                raise UserError(
                    "scheduler.kwargs",
                    dict(spec.kwargs),
                    f"{spec.name} says: {error}",
                    "see that scheduler's arguments",
                ) from None

        return make

    from transformers import get_scheduler

    name = "constant_with_warmup" if spec.name == "constant" else spec.name
    return lambda optimizer: get_scheduler(name, optimizer, spec.warmup_steps, total_steps)


def _of_torch(key: str, name: str) -> Any:
    try:
        return reduce(getattr, name.split(".")[1:], torch)
    except AttributeError:
        raise UserError(key, name, f"torch {torch.__version__} has no such name", "check the spelling") from None


class ReadOnlyOptimizer:
    """What callbacks see of the optimizer: hyperparameters to read. An edit on rank zero would tear the ranks apart."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """A copy of each group's hyperparameters, without its parameters."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
