"""torch's fully_shard (FSDP2): weights, gradients and optimizer state of every layer, sharded by
rows over ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import OptimizerFactory, SchedulerFactory
from orchestrator.engines.optim import param_groups
from orchestrator.engines.precision import Types, dtype_of, is_16_bit
from orchestrator.engines.stepping import Fragment, SteppingEngine
from orchestrator.models.layers import decoder_layers


class FsdpEngine(SteppingEngine):
    """Engine (see base.py) on FSDP2. A rank holds its rows of each weight in fp32 (fp64). Those of
    a layer are gathered when it runs, in bf16 or fp16 if that is the precision, and gradients are
    summed in fp32.
    """

    def wrap(
        self, step: PairStep, optimizer: OptimizerFactory, scheduler: SchedulerFactory
    ) -> None:
        self.world.ensure_process_group()
        self.mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        for layer in _layers(step):
            self._shard(layer, self.settings.reshard_after_forward)
        self._shard(step, reshard=False)  # embeddings and head, used at both ends of a forward pass
        for module in step.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                fsdp: Any = module
                # the loss is divided by the global count already
                fsdp.set_gradient_divide_factor(1.0)
                # gloo only sums, and NCCL cannot divide by 1
                fsdp.set_force_sum_reduction_for_comms(True)
        self.step = self.module = step
        self.saved = step.saved()
        self.trainable = [p for p in step.parameters() if p.requires_grad]
        self.optimizer = optimizer(param_groups(step, self.weight_decay))
        self.scheduler = scheduler(self.optimizer)

    def _shard(self, module: nn.Module, reshard: bool) -> None:
        """Shard the weights of a module that its submodules have not sharded. Weights from a file
        still have the file's dtype; they are cast here, one layer at a time.
        """
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            FSDPModule,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        inside = [m for m in module.modules() if m is not module and isinstance(m, FSDPModule)]
        cut = {p for m in inside for p in m.parameters()}
        for p in module.parameters():
            if p not in cut and p.is_floating_point():
                p.data = p.data.to(self.held if p.requires_grad else self.frozen_held)
        on_gpu = self.world.device.type == "cuda"  # pinned memory needs its driver
        in_16_bits = is_16_bit(self.precision)
        fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=reshard,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype_of(self.precision) if in_16_bits else None,
                reduce_dtype=self.held if in_16_bits else None,
                cast_forward_inputs=False,  # a batch has sums in fp64
            ),
            offload_policy=CPUOffloadPolicy(on_gpu)
            if self.settings.offload == "parameters"
            else OffloadPolicy(),
        )

    @property
    def types(self) -> Types:
        types = super().types
        if not is_16_bit(self.precision):
            return types
        return types._replace(
            weights=f"{types.weights} (gathered in {self.precision})", arithmetic=self.precision
        )

    def release(self) -> None:
        for module in (self.step, *_layers(self.step)):
            module.reshard()  # pyright: ignore[reportCallIssue]

    def _gradients(self) -> list[torch.Tensor]:
        gradients: list[Any] = [p.grad for p in self.trainable if p.grad is not None]
        return [gradient.to_local() for gradient in gradients]

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _fragments(self) -> Iterator[Fragment]:
        size, rank = self.world.size, self.world.rank
        for index, (name, p) in enumerate(self.saved.items()):
            local: Any = p.detach()
            if not hasattr(local, "to_local"):  # part of a reference that every rank holds whole
                yield Fragment(
                    name,
                    tuple(p.shape),
                    0,
                    p.numel(),
                    local.view(-1),
                    None,
                    0,
                    index % size == rank,
                )
                continue
            rows, each = p.shape[0], -(-p.shape[0] // size)  # as torch.chunk splits them
            width = p.numel() // rows
            start, stop = (min(at * each, rows) * width for at in (rank, rank + 1))
            if stop > start:
                holder = p if p.requires_grad else None
                yield Fragment(
                    name, tuple(p.shape), start, stop, local.to_local().view(-1), holder, 0, True
                )

    @torch.no_grad()
    def sync_reference(self, alpha: float) -> None:
        weights: dict[str, Any] = dict(self.step.policy.named_parameters(remove_duplicate=False))
        if not len(self.step.reference_modules):  # the reference is whole on every rank
            weights = _Whole(weights, self.world.device)
        self.step.sync_reference(weights, alpha)


class _Whole(dict[str, Any]):
    """Sharded weights by name, each gathered on access. Collective."""

    def __init__(self, weights: dict[str, Any], device: torch.device) -> None:
        super().__init__(weights)
        self.device = device  # the device of the process group; shards may be on the host

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).to(self.device).full_tensor()


def _layers(step: PairStep) -> list[nn.Module]:
    """Return the modules that are sharded separately: each layer of the policy, and of a reference
    sharded with it.
    """
    layers: list[nn.Module] = list(decoder_layers(step.policy))
    if len(step.reference_modules):
        in_judge = set(step.reference_modules.modules())
        judges = decoder_layers(step.reference.model)
        layers += [layer for layer in judges if layer in in_judge and layer not in layers]
    return layers
