"""Rank, size, device and collectives of this process; the only module that reads RANK and
WORLD_SIZE.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

A_WEEK = timedelta(days=7)  # in effect no time-out; an infinite one overflows


def is_one_of_many() -> bool:
    """Return whether torchrun or `debug --nproc` started this process as one rank of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Return whether this process is rank 0 of those that started together, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class World:
    """Rank, size, device and collectives of this process.

    At size 1 all are identities and need no process group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def join(cls, timeout_s: int, use_gpu: bool | None = None) -> "World":
        """Create the World from an initialised process group, else from torchrun's environment,
        else with one rank.

        timeout_s: seconds after which a collective raises if a peer does not join it.
        use_gpu: None: use GPUs if this machine has one for each of its ranks.
        """
        local_rank, local_size = (
            int(os.environ.get("LOCAL_RANK", "0")),
            int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        if use_gpu is None:
            use_gpu = local_size <= torch.cuda.device_count()
        device = torch.device("cpu")
        if use_gpu:
            # modulo: Ray may make only its own GPU visible to each worker
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if not dist.is_initialized() and is_one_of_many():
            dist.init_process_group(
                "nccl" if use_gpu else "gloo", timeout=timedelta(seconds=timeout_s)
            )
        if not dist.is_initialized():
            return cls(0, 1, local_rank, device)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; any shape, on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Take the elementwise maximum over ranks, in place; any shape, on this rank's device."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def all(self, flag: bool) -> bool:
        """Return whether the flag is true on all ranks."""
        return not self.max(torch.tensor([not flag], dtype=torch.int32, device=self.device)).item()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def collect(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor (all of one shape) in rank order on rank 0, and an empty
        list elsewhere.
        """
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)] if self.is_main else None
        dist.gather(values.contiguous(), parts)
        return parts or []

    @contextmanager
    def first_to_arrive(self, what: str) -> Iterator[bool]:
        """Yield True on the first rank that enters; later ranks wait until the first has left, and
        get False.

        Uses no collective, as ranks that do not enter may be stuck in one.
        """
        if self.size == 1:
            yield True
            return
        store = distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        left = f"{what} left"
        try:
            is_first = store.add(what, 1) == 1
            if not is_first:
                store.wait([left], A_WEEK)
        except RuntimeError:  # the rank that hosts the store has died
            is_first = False
        try:
            yield is_first
        finally:
            if is_first:
                with suppress(RuntimeError):
                    store.set(left, "")

    def ensure_process_group(self) -> None:
        """Create a process group of this rank if there is none: some libraries need one even for a
        single process.
        """
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def leave(self) -> None:
        """Destroy a process group created by `join` (torchrun or --nproc); Ray destroys its own."""
        if dist.is_initialized():
            dist.destroy_process_group()
