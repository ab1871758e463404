"""What every engine promises: the seam behind which gradients, precision and sharding hide."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep, StepOutput
from orchestrator.engines.precision import Types

ParamGroups = list[dict[str, Any]]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Answer = TypeVar("Answer")
ReadRange = Callable[[str, str, int, int], torch.Tensor]
"""(name, key, start, stop) -> the flat range of that tensor, 1-D, on the CPU; raises where it is not fully covered."""

IMPLEMENTATIONS = ("fused", "foreach", "differentiable")
"""Keys of torch's parameter groups that say how an update is computed, which is no state: it depends on the device."""

SCALAR = "scalar:"
"""Prefix of a key whose value is one number for the whole parameter (Adam's step, NAdam's mu_product), not a range."""


NUMBER = "number:"
"""Prefix of a key whose value is a whole number of Python's (the step of DeepSpeed's own optimizers)."""
SHAPED = "shaped:"
"""Prefix of a key whose value has a shape of its own (Adafactor's row_var): "shaped:64,1:row_var"."""


class Owned(NamedTuple):
    """A flat range of one named parameter that this rank alone answers for in a checkpoint."""

    name: str  # as in the policy's state_dict
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    tensors: dict[str, torch.Tensor]  # "param" and the optimizer state of that range, 1-D; under SCALAR names, [1]


class Updated(NamedTuple):
    """What an optimizer step did."""

    grad_norm: torch.Tensor  # L2, before clipping, after unscaling
    lr: float  # the rate this step used
    skipped: bool


class Engine(Protocol):
    """Only an engine divides, scales or clips a gradient. `micro_step` n times, `finite`, then `optimizer_step`."""

    step: PairStep
    optimizer: Optimizer  # the one that the factory made, whose groups the schedule moves
    scheduler: LRScheduler
    meets_in_forward: bool  # whether a forward pass is collective: weights are gathered in it

    @property
    def types(self) -> Types:
        """What it holds, computes and adds in."""
        ...

    def wrap(self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory) -> None:
        """Take the module, from the host where the engine shards weights; build optimizer and schedule over its
        trainable parameters."""
        ...

    def inside(self, ask: Callable[[], Answer]) -> Answer:
        """What `ask` returns when it is called in a forward pass of the wrapped module, without gradient and with
        dropout off: the only place where a weight may be read. Collective where the engine shards weights."""
        ...

    def micro_step(self, batch: PairBatch, counts: Counts, last: bool) -> StepOutput:
        """Forward and backward; gradients are summed over ranks in the last micro-step of a step."""
        ...

    def evaluate(self, batch: PairBatch, counts: Counts) -> StepOutput:
        """Forward without gradient."""
        ...

    def reference_logps(self, batch: PairBatch) -> torch.Tensor:
        """What the reference says of a batch, [2B] in fp64, without running the policy."""
        ...

    def sync_reference(self, alpha: float) -> None:
        """reference = alpha * policy + (1 - alpha) * reference, on every rank alike."""
        ...

    def finite(self) -> torch.Tensor:
        """Whether this rank's summed gradient is finite: a bool on the device. Once per step, before the update."""
        ...

    def optimizer_step(self, apply: bool) -> Updated:
        """Clip and update, or with apply=False drop the gradient; either way the gradient is gone afterwards."""
        ...

    def discard(self) -> None:
        """Drop the gradient as if its micro-steps had not been."""
        ...

    def close(self) -> None:
        """The end: nothing holds the weights any more that the caller does not."""
        ...

    def state(self) -> dict[str, Any]:
        """Schedule, loss scale and the optimizer's hyperparameters; the same on every rank and for every world size."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave."""
        ...

    def owned(self) -> Iterator[Owned]:
        """What this rank writes into a checkpoint. No collectives."""
        ...

    def put(self, read: ReadRange, keys: Callable[[str], set[str]]) -> None:
        """Fill parameters and optimizer state from a checkpoint; `keys(name)` are those it has of a parameter."""
        ...
