"""Orders of data on all ranks of a run."""

from typing import Any

import numpy as np

from orchestrator.data.order import (
    Integers,
    Order,
)

WORLDS = [1, 2, 3, 5, 8]


def lengths(pairs: int, seed: int = 0, longest: int = 40) -> Integers:
    return np.random.default_rng(seed).integers(1, longest, (pairs, 3))


def orders(
    world: int, pairs: int, batch: int, micro: int | None = 2, **settings: Any
) -> list[Order]:
    """The order as each rank of a world computes it."""
    token_lengths = settings.pop("lengths", None)
    token_lengths = lengths(pairs) if token_lengths is None else token_lengths
    return [Order(token_lengths, batch, rank, world, 7, micro, **settings) for rank in range(world)]
