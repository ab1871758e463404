"""DistributedDataParallel with the optimizer state sharded over ranks; on one rank, plain module
and optimizer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import OptimizerFactory, SchedulerFactory
from orchestrator.engines.optim import param_groups
from orchestrator.engines.precision import autocast
from orchestrator.engines.stepping import Fragment, SteppingEngine


class DdpEngine(SteppingEngine):
    """Engine (see base.py) with whole fp32 (fp64) weights on every rank, and autocast for bf16 and
    fp16.
    """

    shards_gradients = False

    def wrap(
        self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory
    ) -> None:
        self.step = self.module = step
        self.saved = step.saved()
        self.trainable = [p for p in step.parameters() if p.requires_grad]
        groups = param_groups(step, self.weight_decay)
        if self.world.size > 1:
            bucket = self.settings.bucket_size
            self.module = DistributedDataParallel(
                step,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket and max(1, 4 * bucket // 2**20),
            )
            self.module.register_comm_hook(None, _sum_gradients)
        if self.world.size > 1 and self.settings.shard_optimizer:
            make: Any = optimizer
            self.optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=make)
        else:
            self.optimizer = optimizer(groups)
        self.scheduler = scheduler(self.optimizer)

    def _before_micro_step(self, last: bool) -> None:
        if isinstance(self.module, DistributedDataParallel):
            self.module.require_backward_grad_sync = last  # as no_sync() does

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.trainable if p.grad is not None]

    def drop_gradients(self) -> None:
        # gradients are views of DDP's buckets: set to None, accumulation would allocate new ones
        # beside the buckets
        self.optimizer.zero_grad(set_to_none=self.module is self.step)

    def _fragments(self) -> Iterator[Fragment]:
        mine = {p for group in self._keeper().param_groups for p in group["params"]}
        deals = isinstance(self.optimizer, ZeroRedundancyOptimizer)
        for index, (name, p) in enumerate(self.saved.items()):
            # trainable parameters belong to the rank with their optimizer state, frozen ones to
            # ranks in turn
            is_mine = (
                p in mine
                if p.requires_grad and deals
                else index % self.world.size == self.world.rank
            )
            holder = p if p in mine else None
            yield Fragment(
                name, tuple(p.shape), 0, p.numel(), p.detach().view(-1), holder, 0, is_mine
            )

    def _keeper(self) -> Optimizer:
        return (
            self.optimizer.optim
            if isinstance(self.optimizer, ZeroRedundancyOptimizer)
            else self.optimizer
        )

    def _without_gradient(self, *args: Any) -> Any:
        wrapped, self.module = self.module, self.step  # without gradients DDP is not needed
        try:
            return super()._without_gradient(*args)
        finally:
            self.module = wrapped

    def _arithmetic(self) -> AbstractContextManager[Any]:
        return autocast(self.world.device, self.precision)


def _sum_gradients(
    _: None,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket over ranks: the loss is divided by the global count already, and DDP's own hook
    would divide it by the world size again.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
