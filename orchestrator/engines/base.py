"""The interface of an engine, which hides gradients, precision and sharding."""

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
"""(name, key, start, stop) -> the flat range of that tensor, 1-D, on the CPU; raises if it is not
fully covered.
"""

IMPLEMENTATIONS = ("fused", "foreach", "differentiable")
"""Keys of torch's parameter groups that select an implementation by device; they are not part of
the state.
"""

SCALAR = "scalar:"
"""Prefix of a key whose value is one number for the whole parameter (Adam's step, NAdam's
mu_product), not a range.
"""


NUMBER = "number:"
"""Prefix of a key whose value is a Python int (the step of DeepSpeed's own optimizers)."""
SHAPED = "shaped:"
"""Prefix of a key whose value has a different shape from the parameter (Adafactor's row_var):
"shaped:64,1:row_var".
"""


class Shard(NamedTuple):
    """A flat range of one tensor of `PairStep.saved()` that only this rank writes to a
    checkpoint.
    """

    name: str  # as in `PairStep.saved()`
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    # "param" and the optimizer state of that range, 1-D; under SCALAR names, [1]
    tensors: dict[str, torch.Tensor]


class StepResult(NamedTuple):
    """The result of an optimizer step."""

    grad_norm: torch.Tensor  # L2, before clipping, after unscaling
    lr: float  # learning rate of this step
    skipped: bool


class Engine(Protocol):
    """The interface of an engine, which alone divides, scales and clips gradients.

    A step calls `micro_step` once per micro-batch, then `grads_finite`, then `optimizer_step`.
    """

    step: PairStep
    optimizer: (
        Optimizer  # the one that the factory built, whose parameter groups the schedule updates
    )
    scheduler: LRScheduler
    grad_norm: torch.Tensor  # scalar, as in StepResult; computed by `grads_finite`
    forward_is_collective: bool  # True if a forward pass is collective, because it gathers weights
    after_forward: Callable[[], None]  # called in a micro-step between forward and backward

    @property
    def types(self) -> Types:
        """Return the dtypes of weights, arithmetic, gradients and optimizer state."""
        ...

    def wrap(
        self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory
    ) -> None:
        """Wrap the module, which is still on the host if the engine shards weights; build optimizer
        and schedule over its trainable parameters.
        """
        ...

    def run_in_forward(self, ask: Callable[[], Answer]) -> Answer:
        """Call `ask` in a forward pass of the wrapped module and return its result, without
        gradient or dropout.

        Weights may be read nowhere else. Collective if the engine shards weights.
        """
        ...

    def micro_step(self, batch: PairBatch, counts: Counts, last: bool) -> StepOutput:
        """Run forward and backward; the last micro-step of a step sums the gradients over ranks."""
        ...

    def evaluate(self, batch: PairBatch, counts: Counts) -> StepOutput:
        """Run forward without gradient."""
        ...

    def reference_logps(self, batch: PairBatch) -> torch.Tensor:
        """Return the reference's log-probs [2B] of a batch in fp64, without running the policy."""
        ...

    def sync_reference(self, alpha: float) -> None:
        """Set reference = alpha * policy + (1 - alpha) * reference on every rank."""
        ...

    def grads_finite(self) -> torch.Tensor:
        """Return whether this rank's summed gradient is finite, as a bool on the device. Call once
        per step, before the update.
        """
        ...

    def optimizer_step(self, apply: bool) -> StepResult:
        """Clip the gradient and update the weights (apply=False: skip both), then drop the
        gradient.
        """
        ...

    def drop_gradients(self) -> None:
        """Drop the gradient and all other traces of the micro-steps since the last update."""
        ...

    def close(self) -> None:
        """Release every reference to the weights that the engine holds."""
        ...

    def state(self) -> dict[str, Any]:
        """Return schedule, loss scale and optimizer hyperparameters, which do not depend on rank or
        world size.
        """
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""
        ...

    def iter_shards(self) -> Iterator[Shard]:
        """Yield the ranges that this rank writes to a checkpoint. No collectives."""
        ...

    def non_finite_weights(self) -> list[str]:
        """Return the names of the tensors whose range on this rank, as in `iter_shards`, is not
        finite. No collectives.
        """
        ...

    def load_shards(self, read: ReadRange, keys: Callable[[str], set[str]]) -> None:
        """Load what `iter_shards` yields from a checkpoint; `keys(name)`: the keys it has for
        a parameter.
        """
        ...
