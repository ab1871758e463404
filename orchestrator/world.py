"""Rank, size and device of this process, and the few collectives; the only reader of RANK and WORLD_SIZE."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def is_one_of_many() -> bool:
    """Whether torchrun, or `debug --nproc`, started this process as one rank of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@dataclass(frozen=True)
class World:
    """This process among its peers. At size 1 every collective is the identity and no process group is needed."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def join(cls, timeout_s: int, use_gpu: bool | None = None) -> "World":
        """Take the ranks from an initialised process group, else from torchrun's environment, else be alone.

        timeout_s: seconds after which a collective that a peer never enters raises here.
        use_gpu: where it is not said, GPUs are used if this machine has one for each of its ranks.
        """
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if use_gpu is None:
            use_gpu = local_size <= torch.cuda.device_count()
        device = torch.device("cpu")
        if use_gpu:
            device = torch.device(
                "cuda", local_rank % torch.cuda.device_count()
            )  # Ray may show each worker only its own
            torch.cuda.set_device(device)
        if not dist.is_initialized() and is_one_of_many():
            dist.init_process_group("nccl" if use_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
        if not dist.is_initialized():
            return cls(0, 1, local_rank, device)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero, the one that reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; any shape, on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over ranks, in place; any shape, on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def meet(self) -> None:
        """Make sure that there is a process group, if only of this rank: some libraries need one even so."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def leave(self) -> None:
        """Tear down a process group that `join` made (torchrun or --nproc); Ray tears down its own."""
        if dist.is_initialized():
            dist.destroy_process_group()
