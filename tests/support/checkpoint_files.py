"""Small checkpoints for tests, and the ways to break them."""

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.engines.base import Shard
from orchestrator.training.checkpoint_writer import save
from orchestrator.training.manifest import (
    MANIFEST,
)
from orchestrator.training.rng import seed_everything
from orchestrator.world import World
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE

META = {"pairs_seen": 8, "engine": {"scheduler": {"milestones": {2: 1, 10: 3}, "lr": [1e-5, 0.1]}}}


def part(name: str, shape: tuple[int, ...], start: int, stop: int, offset: float = 0.0) -> Shard:
    """The range of a parameter that counts upwards, with optimizer state."""
    values = torch.arange(start, stop, dtype=torch.float32) + offset
    return Shard(
        name, shape, start, stop, {"param": values, "exp_avg": -values, "step": torch.tensor([3.0])}
    )


def saved(folder: Path, step: int, world: World = ALONE) -> Path:
    return save(folder, step, [part("a", (3, 4), 0, 12, step), part("b", (5,), 0, 5)], META, world)


def on_two_ranks(folder: Path) -> list[Any]:
    """A checkpoint whose parameter `a` is cut between two ranks, and whose `b` belongs to the
    second.
    """

    def work(world: World) -> Path:
        seed_everything(100 + world.rank)
        mine = (
            [part("a", (3, 4), 0, 7)]
            if world.rank == 0
            else [part("a", (3, 4), 7, 12), part("b", (5,), 0, 5)]
        )
        return save(folder, 4, mine, META, world)

    return on_ranks(2, work)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


BREAKS = {
    "a flipped bit": flip,
    "a file cut short": cut,
    "an emptied file": lambda folder: (folder / "index.json").write_text(""),
    "a missing file": lambda folder: (folder / "rng_00000.safetensors").unlink(),
    "a changed document": lambda folder: (folder / "meta.json").write_text('{"step": 3}'),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text()[:50]
    ),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "a manifest of something else": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "a manifest without files": lambda folder: (folder / MANIFEST).write_text('{"files": null}'),
}


def draws() -> list[float]:
    """Numbers of every generator, an odd count of the normal ones, whose second half a generator
    may keep.
    """
    normal = [np.random.randn(), random.gauss(0, 1), torch.randn(1).item()]
    return [
        *normal,
        np.random.rand(),
        random.random(),
        torch.rand(1).item(),
        float(torch.randint(1000, ())),
    ]
