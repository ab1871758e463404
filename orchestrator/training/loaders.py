"""Build the loaders of the training and evaluation sets on this rank."""

from typing import NamedTuple

import numpy as np

from orchestrator.data.collate import PackedCollator, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Order, PairCost, Share, epoch_order, fed_lengths
from orchestrator.data.pairs import Pairs
from orchestrator.settings.model import AttentionName
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import PreparedRun, pad_id

# tokens of a packed row on a CPU: shorter rows have more overhead, longer ones exceed its caches
CPU_ROW = 1024


class Loaders(NamedTuple):
    """The loaders of a run."""

    train: Loader
    eval: dict[str, Loader]  # by the name of the evaluation set


def our_collator(
    context: RunContext, prepared: PreparedRun, attention: AttentionName
) -> PackedCollator | PreferenceCollator:
    """Return the collator of the layout that belongs to that attention."""
    data = context.spec.data
    if attention == "padded":
        return PreferenceCollator(pad_id(prepared.tokenizer, prepared.config), data)
    return PackedCollator(data)


def build_loaders(
    context: RunContext,
    prepared: PreparedRun,
    collator: PackedCollator | PreferenceCollator,
    cost: PairCost,
    first_batch_only: bool,
) -> Loaders:
    """Build the loaders of all sets, whose batches a user's collator makes instead if there is one.

    first_batch_only: only the pairs of the first global batch, and no evaluation set.
    """
    spec, world = context.spec, context.world
    is_packed = isinstance(collator, PackedCollator)
    limits = [spec.batch.max_tokens_per_microbatch]
    if is_packed and world.device.type == "cpu":
        limits.append(CPU_ROW)

    def loader(pairs: Pairs, shares: tuple[Share, ...] = ()) -> Loader:
        order = Order(
            fed_lengths(pairs.lengths, spec.data.keep_last),
            spec.batch.global_batch_size,
            world.rank,
            world.size,
            spec.run.seed,
            spec.batch.micro_batch_size,
            min((limit for limit in limits if limit), default=None),
            is_packed,
            cost,
            shares,
        )
        return Loader(pairs, order, prepared.collator or collator)

    train = prepared.train
    if first_batch_only:
        order = epoch_order(train.shares, spec.run.seed, epoch=0)
        return Loaders(loader(train.only(np.unique(order[: spec.batch.global_batch_size]))), {})
    held_out = {name: loader(pairs) for name, pairs in prepared.eval.items()}
    return Loaders(loader(train, train.shares), held_out)
