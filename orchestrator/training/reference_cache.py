"""Open the caches of reference log-probs, and fill them before the first step."""

import logging
import time
from collections.abc import Callable
from typing import Any

from orchestrator.data.collate import PairBatch
from orchestrator.data.loader import Loader
from orchestrator.data.refcache import RefCache, cache_folder
from orchestrator.engines.base import Engine
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import StopRequested, UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.context import RunContext
from orchestrator.training.loaders import Loaders
from orchestrator.training.prepare import named_sets
from orchestrator.training.stops import StopAgreement
from orchestrator.world import World

logger = logging.getLogger(__name__)


def open_caches(spec: RunSpec, loaders: Loaders, identity: dict[str, Any]) -> None:
    """Open the caches of log-probs of a reference with that identity, for all loaders.

    Raises:
        UserError: the cache cannot be written and is required before training; a lazy cache is
            skipped with a warning.
    """
    try:
        folder = cache_folder(spec.cache_dir, identity)
    except OSError as error:
        where = f"{spec.cache_dir}/reference_logps cannot be written ({error.strerror})"
        if spec.reference.traits.is_precomputed:
            cure = "set data.cache_dir to a writable folder, or reference.kind=copy"
            raise UserError("reference.kind", spec.reference.kind, where, cure) from None
        if spec.reference_cache == "full":
            cure = "set data.cache_dir to a writable folder, or reference.cache=off"
            raise UserError("reference.cache", "full", where, cure) from None
        logger.warning("%s: the reference runs every time", where)
        return
    train = loaders.train
    if spec.reference_cache == "full" or train.order.takes_each_once:
        train.cache = RefCache(folder, train.pairs, "train", spec.data.keep_last)
    for name, loader in loaders.eval.items():
        loader.cache = RefCache(folder, loader.pairs, f"eval {name}".rstrip(), spec.data.keep_last)


def fill_caches(context: RunContext, engine: Engine, loaders: Loaders) -> None:
    """Compute all reference log-probs before the first step. Collective.

    Raises:
        StopRequested: on every rank, if the run should stop; what is computed stays in the cache.
        UserError: on every rank, if one lacks log-probs of reference.kind=precomputed in its cache.
    """
    spec, world = context.spec, context.world
    stops = StopAgreement(world, context.session)

    def each(number: int) -> None:
        context.session.beat(0, "fill", number)
        stops.check()

    for name, loader in named_sets(loaders.train, loaders.eval):
        if loader.cache is None:
            continue
        try:
            pairs, seconds = fill_cache(engine, loader, world, each)
        except StopRequested as stop:
            known = _known_on_all_ranks(loader.cache, world)
            of_all = f"{known} of {counted(len(loader.pairs), f'{name} pair')}"
            raise StopRequested(f"{stop}, with the reference cached for {of_all}") from None
        if pairs and world.is_main:
            filled = counted(pairs, f"{name} pair")
            print(f"reference cache: {filled} in {seconds:.1f} s", flush=True)
        missing = max(world.gather(len(loader.cache.unknown())))
        if missing and spec.reference.traits.is_precomputed:
            lacking = f"the log-probs of {counted(missing, f'{name} pair')}"
            rule = f"{lacking} could not be written to {loader.cache.folder}"
            cure = "free space there, or set data.cache_dir to another"
            raise UserError("reference.kind", "precomputed", rule, cure)


def _known_on_all_ranks(cache: RefCache, world: World) -> int:
    """Return for how many pairs the ranks have computed log-probs so far. Collective."""
    world.gather(None)  # every rank has written
    cache.read()
    return len(cache.pair_ids) - len(cache.unknown())


def fill_cache(
    engine: Engine, loader: Loader, world: World, each: Callable[[int], None] = lambda _: None
) -> tuple[int, float]:
    """Compute the reference log-probs of every pair that is not in the cache, shared among the
    ranks. Collective.

    The micro-batches are those of the whole data set, even if some are cached, so that an
    interrupted fill ends with bitwise the same numbers.

    each: called before each micro-batch with its number.

    Returns the number of pairs that were not cached, and the seconds that it took.
    """
    assert loader.cache is not None
    began = time.monotonic()
    micro_batches, make = loader.whole(step=0)
    unknown = world.gather(len(loader.cache.unknown()))  # before any rank writes
    if not any(unknown):
        return 0, 0.0
    for number, micro in enumerate(micro_batches, start=1):
        each(number)
        is_needed = not micro.is_filler and loader.cache.known(micro.pairs) is None
        # a collective forward pass runs on all ranks if one needs it
        if not world.all(not is_needed) if engine.forward_is_collective else is_needed:
            batch = make(micro)
            ref_logps = engine.reference_logps(batch.to(world.device))
            if is_needed:
                loader.remember(batch, ref_logps)
    world.gather(None)  # every rank has written
    loader.cache.read()
    return unknown[0], time.monotonic() - began


def cached_on_all_ranks(world: World, loader: Loader, batches: list[PairBatch]) -> list[PairBatch]:
    """Drop the cached log-probs of a step's micro-batches if one rank lacks its own: a forward pass
    that gathers weights must run on all ranks. Collective.
    """
    has_all = all(batch.ref_logps is not None for batch in batches)
    if world.all(has_all) or loader.cache is None:
        return batches
    return [batch._replace(ref_logps=None) for batch in batches]
