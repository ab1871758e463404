"""DistributedDataParallel with the optimizer state sharded over ranks; at one rank the bare module and optimizer."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep, StepOutput
from orchestrator.engines.base import SCALAR, OptimizerFactory, Owned, ReadRange, SchedulerFactory, Updated
from orchestrator.engines.optim import param_groups
from orchestrator.settings.spec import Precision
from orchestrator.world import World

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The context in which a forward pass computes in that precision over fp32 weights."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


class DdpEngine:
    """Engine of base.py. Weights are whole on every rank, in fp32 (fp64); bf16 and fp16 are autocast over them."""

    def __init__(self, world: World, precision: Precision, max_grad_norm: float | None, weight_decay: float) -> None:
        self.world = world
        self.precision: Precision = precision
        self.max_grad_norm, self.weight_decay = max_grad_norm, weight_decay
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")

    def wrap(self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory) -> None:
        self.step = step
        self.saved = step.saved()
        self.trainable = [p for p in step.parameters() if p.requires_grad]
        groups = param_groups(step, self.weight_decay)
        self.module: PairStep | DistributedDataParallel = step
        if self.world.size > 1:
            self.module = DistributedDataParallel(step, forward_sync_buffers=False, gradient_as_bucket_view=True)
            self.module.register_comm_hook(None, _sum_gradients)
            self.optimizer: Optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=optimizer)  # pyright: ignore
        else:
            self.optimizer = optimizer(groups)
        self.scheduler = scheduler(self.optimizer)

    def micro_step(self, batch: PairBatch, counts: Counts, last: bool) -> StepOutput:
        with self._unsynced(last):
            with self._autocast():
                output: StepOutput = self.module(batch, counts)
            self.scaler.scale(output.loss).backward()
        return output._replace(loss=output.loss.detach())

    @torch.no_grad()
    def evaluate(self, batch: PairBatch, counts: Counts) -> StepOutput:
        self.step.eval()  # dropout would make it noisy, and draw random numbers that training should have drawn
        try:
            with self._autocast():
                return self.step(batch, counts)
        finally:
            self.step.train()

    @torch.no_grad()
    def reference_logps(self, batch: PairBatch) -> torch.Tensor:
        with self._autocast():
            return self.step.reference(batch)

    def sync_reference(self, alpha: float) -> None:
        self.step.reference.sync(self.step.policy, alpha)

    def finite(self) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        return self.grad_norm.isfinite()

    def optimizer_step(self, apply: bool) -> Updated:
        lr = float(self.scheduler.get_last_lr()[0])
        if apply:
            if self.max_grad_norm is not None:
                clip_grads_with_norm_(self.trainable, self.max_grad_norm, self.grad_norm)
            self.scaler.step(self.optimizer)
            self.scheduler.step()
        self.scaler.update()  # after a skipped step this lowers the scale
        self.discard()
        return Updated(self.grad_norm, lr, not apply)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            # load_state_dict of a scheduler leaves the groups alone, and their lr is where the schedule lives
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)

    def owned(self) -> Iterator[Owned]:
        local = self._local_optimizer()
        mine = {p for group in local.param_groups for p in group["params"]}
        for index, (name, p) in enumerate(self.saved.items()):
            # trainable parameters where their optimizer state is, frozen ones dealt round
            if not (p in mine if p.requires_grad else index % self.world.size == self.world.rank):
                continue
            tensors = {"param": p.detach().flatten()}
            for key, value in local.state.get(p, {}).items():
                tensors[key if value.ndim else SCALAR + key] = value.detach().flatten()
            yield Owned(name, tuple(p.shape), 0, p.numel(), tensors)

    @torch.no_grad()
    def put(self, read: ReadRange, keys: Callable[[str], set[str]]) -> None:
        local = self._local_optimizer()
        groups = {p: group for group in local.param_groups for p in group["params"]}
        for name, p in self.saved.items():
            p.copy_(read(name, "param", 0, p.numel()).view_as(p))
            if p not in groups:
                continue
            # torch keeps scalars of the state on the host unless the optimizer is fused or capturable
            on_device = groups[p].get("fused") or groups[p].get("capturable")
            local.state[p] = {}
            for key in keys(name) - {"param"}:
                if key.startswith(SCALAR):
                    value = read(name, key, 0, 1)[0].to(p.device if on_device else "cpu")
                    local.state[p][key.removeprefix(SCALAR)] = value
                else:
                    local.state[p][key] = read(name, key, 0, p.numel()).view_as(p).to(p.device)

    def _local_optimizer(self) -> Optimizer:
        return self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer

    def _unsynced(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.world.device, self.precision)


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # pyright: ignore[reportPrivateImportUsage]
    """The loss was divided by the global count already; DDP's own hook would divide by the world size again."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
