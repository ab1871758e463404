"""The common base of the engines: micro-steps, loss scale, clipping, optimizer step, and state for
checkpoints.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep, StepOutput
from orchestrator.engines.base import (
    IMPLEMENTATIONS,
    NUMBER,
    SCALAR,
    SHAPED,
    Answer,
    OptimizerFactory,
    ReadRange,
    SchedulerFactory,
    Shard,
    StepResult,
)
from orchestrator.engines.precision import Types, dtype_held, is_16_bit
from orchestrator.engines.scale import LossScale
from orchestrator.models.dtypes import dtype_name
from orchestrator.models.storage import persistent_buffers
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.precision import PRECISION_TRAITS, Precision
from orchestrator.world import World


class Fragment(NamedTuple):
    """This rank's flat range of one named parameter, and the place of its optimizer state."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    weight: torch.Tensor  # 1-D view of the weights that the optimizer updates
    # the optimizer's key of the state; None if this rank has no state of it
    holder: torch.Tensor | None
    offset: int  # of the range in the holder
    is_mine: bool  # True if this rank writes it to a checkpoint


class SteppingEngine:
    """Base class of the engines (see base.py); subclasses wrap the module and locate gradients and
    shards.
    """

    step: PairStep
    module: nn.Module  # the wrapped step, whose forward is called
    optimizer: Optimizer
    scheduler: LRScheduler
    grad_norm: torch.Tensor
    shards_gradients = (
        True  # True if each rank's gradient norm covers only its part of the gradient
    )
    # in fp16: number of ranks over which the gradient is averaged; unscaling turns it into the sum
    averaged_over = 1

    def __init__(
        self,
        settings: EngineSpec,
        world: World,
        precision: Precision,
        max_grad_norm: float | None,
        weight_decay: float,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        """Initialise the engine. frozen_dtype: dtype of frozen weights, for engines that cast
        mapped ones; default: that of the trainable weights.
        """
        self.world, self.settings = world, settings
        self.after_forward: Callable[[], None] = lambda: None
        self.precision: Precision = precision
        self.held = dtype_held(precision)
        self.frozen_held = frozen_dtype or self.held
        self.max_grad_norm, self.weight_decay = max_grad_norm, weight_decay
        self.scale = LossScale(PRECISION_TRAITS[precision].scales_loss)
        self.forward_is_collective = settings.shards_weights

    # --- overridden by each engine ----------------------------------------------------------------

    def wrap(
        self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory
    ) -> None:
        raise NotImplementedError

    def release(self) -> None:
        """Free weights that are still gathered after a forward pass without a backward pass."""

    def close(self) -> None:
        """Release the weights, as in base.py."""

    @property
    def types(self) -> Types:
        computes = f"{self.precision} by autocast" if is_16_bit(self.precision) else self.precision
        state = "8 bits" if "8bit" in type(self._keeper()).__name__ else dtype_name(self.held)
        return Types(dtype_name(self.held), computes, dtype_name(self.held), state)

    def _backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a loss."""
        loss.backward()

    def _gradients(self) -> list[torch.Tensor]:
        """Return this rank's part of the summed gradient, which the caller may change in place."""
        raise NotImplementedError

    def _update(self) -> None:
        """Run the optimizer's step."""
        self.optimizer.step()

    def drop_gradients(self) -> None:
        raise NotImplementedError

    def _fragments(self) -> Iterator[Fragment]:
        """Yield everything that this rank holds. No collectives."""
        raise NotImplementedError

    def _after_loading(self) -> None:
        """Propagate changes of the weights of `_fragments` to those of the forward pass."""

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """Return the context manager around every forward pass (autocast under DDP)."""
        return nullcontext()

    # --- a step -----------------------------------------------------------------------------------

    def micro_step(self, batch: PairBatch, counts: Counts, last: bool) -> StepOutput:
        self._before_micro_step(last)
        with self._arithmetic():
            output: StepOutput = self.module(batch, counts)
        self.after_forward()
        self._backward(self.scale.scaled(output.loss))
        return output._replace(loss=output.loss.detach())

    def _before_micro_step(self, last: bool) -> None:
        """Prepare a micro-step; the last one of a step sums gradients over ranks."""

    def grads_finite(self) -> torch.Tensor:
        gradients = self._gradients()
        if self.scale.enabled and gradients:  # unscale once per step
            torch._foreach_mul_(gradients, self.averaged_over / self.scale.value)  # pyright: ignore
        self.grad_norm = self._norm(gradients)
        return self.grad_norm.isfinite()

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the L2 norm of the whole gradient."""
        if not self.shards_gradients:
            return nn.utils.get_total_norm(gradients)
        device = self.world.device
        squares = torch.zeros(1, dtype=torch.float64, device=device)
        if gradients:
            norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
            squares += (
                torch.stack([norm.to(device, torch.float64) for norm in norms]).square().sum()
            )
        return self.world.sum(squares)[0].sqrt().to(self.held)

    def optimizer_step(self, apply: bool) -> StepResult:
        lr = float(self.scheduler.get_last_lr()[0])
        if apply:
            if self.max_grad_norm is not None:  # the formula of torch's clip_grad_norm_
                factor = (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
                if gradients := self._gradients():
                    factor = factor.to(gradients[0].device)
                    torch._foreach_mul_(gradients, factor)  # pyright: ignore
            self._update()
            self.scheduler.step()
        self.scale.update(applied=apply)
        self.drop_gradients()
        return StepResult(self.grad_norm, lr, not apply)

    # --- without gradient -------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: PairBatch, counts: Counts) -> StepOutput:
        return self._without_gradient(batch, counts)

    def run_in_forward(self, ask: Callable[[], Answer]) -> Answer:
        with torch.no_grad():
            return self._without_gradient(None, None, ask)[0]

    def _without_gradient(self, *args: Any) -> Any:
        self.step.eval()  # dropout would add noise, and advance the random state of training
        try:
            with self._arithmetic():
                return self.module(*args)
        finally:
            self.step.train()
            self.release()

    def reference_logps(self, batch: PairBatch) -> torch.Tensor:
        return self.run_in_forward(lambda: self.step.reference_logps(batch))

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        policy_weights = dict(self.step.policy.named_parameters(remove_duplicate=False))
        self.step.sync_reference(policy_weights, alpha)

    # --- state for checkpoints --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler.state_dict(),
            "scale": self.scale.state(),
            # a scheduler's load_state_dict does not restore the lr in the groups
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in self.optimizer.param_groups
            ],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self.scale.set_state(state["scale"])
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k not in IMPLEMENTATIONS})

    def iter_shards(self) -> Iterator[Shard]:
        for name, shape, start, stop, weight, holder, offset, is_mine in self._fragments():
            if not is_mine:
                continue
            tensors = {"param": weight}
            state = self._keeper().state.get(holder, {}) if holder is not None else {}
            for key, value in state.items():
                if not isinstance(value, torch.Tensor):
                    tensors[NUMBER + key] = torch.tensor([value])
                elif not value.ndim:
                    # a copy: flattened weights share one scalar
                    tensors[SCALAR + key] = value.detach().flatten().clone()
                elif value.shape != holder.shape:  # pyright: ignore[reportOptionalMemberAccess]
                    tensors[f"{SHAPED}{','.join(map(str, value.shape))}:{key}"] = (
                        value.detach().flatten().clone()
                    )
                else:
                    tensors[key] = _flat(value)[offset : offset + stop - start]
            yield Shard(name, shape, start, stop, tensors)

    @torch.no_grad()
    def non_finite_weights(self) -> list[str]:
        held = [
            (part.name, part.weight)
            for part in self._fragments()
            if part.is_mine and part.weight.numel() and part.weight.is_floating_point()
        ]
        if not held:
            return []
        # the largest absolute value is not finite if any value is not, and cannot overflow
        peaks = torch._foreach_norm([weight for _, weight in held], math.inf)  # pyright: ignore
        device = self.world.device
        finite = torch.stack([peak.to(device, torch.float64) for peak in peaks]).isfinite()
        return [
            name
            for (name, _), is_finite in zip(held, finite.tolist(), strict=True)
            if not is_finite
        ]

    @torch.no_grad()
    def load_shards(self, read: ReadRange, keys: Callable[[str], set[str]]) -> None:
        keeper = self._keeper()
        groups = {p: group for group in keeper.param_groups for p in group["params"]}
        keeper.state.clear()
        buffers = persistent_buffers(self.step.policy)
        for name, _, start, stop, weight, holder, offset, _ in self._fragments():
            if name in buffers and not keys(name):
                # checkpoints of an older version lack them: keep those of the loaded model
                continue
            weight.copy_(read(name, "param", start, stop))
            if holder is None:
                continue
            # torch keeps scalars of the state on the host unless the optimizer is fused or
            # capturable
            group = groups.get(holder, keeper.defaults)  # ZeRO-3 has groups only during a step
            scalars_on = (
                holder.device
                if group.get("fused") or group.get("capturable")
                else torch.device("cpu")
            )
            for key in sorted(keys(name) - {"param"}):
                if key.startswith(SCALAR):
                    keeper.state[holder][key.removeprefix(SCALAR)] = read(name, key, 0, 1)[0].to(
                        scalars_on
                    )
                elif key.startswith(NUMBER):
                    keeper.state[holder][key.removeprefix(NUMBER)] = read(name, key, 0, 1).item()
                elif key.startswith(SHAPED):
                    sizes, own = key.removeprefix(SHAPED).split(":")
                    shape = [int(size) for size in sizes.split(",")]
                    whole = read(name, key, 0, torch.Size(shape).numel()).view(shape)
                    keeper.state[holder][own] = whole.to(holder.device)
                else:
                    part = read(name, key, start, stop)
                    if key not in keeper.state[holder]:  # some optimizers keep it in 8 bits
                        keeper.state[holder][key] = torch.zeros_like(
                            holder, dtype=part.dtype, requires_grad=False
                        )
                    _flat(keeper.state[holder][key])[offset : offset + stop - start].copy_(part)
        self._after_loading()

    def _keeper(self) -> Optimizer:
        """Return the optimizer that holds this rank's state."""
        return self.optimizer


def _flat(value: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor as a 1-D view."""
    local: Any = value.detach()
    return (local.to_local() if hasattr(local, "to_local") else local).view(-1)
