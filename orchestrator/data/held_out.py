"""Hold out some of the training pairs for evaluation (data.eval_fraction)."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.order import Integers
from orchestrator.data.pairs import COUNTED, Pairs
from orchestrator.settings.errors import UserError


def without_held_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split pairs into (training pairs, evaluation pairs): hold out all pairs of some prompts,
    chosen by a hash of their tokens and the seed, as close to the fraction as possible.

    Raises:
        UserError: a training set or the evaluation set would be empty.
    """
    prompts, sizes = _prompts(pairs, seed)
    held = _is_held_out(sizes, fraction * len(pairs))[prompts]
    train, held_out = pairs.only(np.flatnonzero(~held)), pairs.only(np.flatnonzero(held))
    for name in COUNTED:  # counts of all rows, as dropped rows belong to neither part
        setattr(train, name, getattr(pairs, name))
    of_sets = zip(pairs.sets, train.shares, strict=True)
    empty = next((each for each, share in of_sets if not share.pairs), None)
    if empty is not None or not len(held_out):
        which = f"every pair of {empty.source}" if empty else "none"
        rule = f"holds out {which}, of {len(pairs)} pairs with {len(sizes)} prompts"
        fix = f"{'lower' if empty else 'raise'} it, or set data.eval to a file"
        raise UserError("data.eval_fraction", fraction, rule, fix)
    return train, held_out


def _prompts(pairs: Pairs, seed: int) -> tuple[Integers, Integers]:
    """Return [N] the prompt of each pair, as its place in the order of hashes, and the number of
    pairs of each prompt.
    """
    key = str(seed).encode()
    digests = (hashlib.blake2b(ids, digest_size=8, key=key).digest() for ids in pairs.prompts())
    hashes = np.frombuffer(b"".join(digests), "<u8")
    _, prompts, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    return prompts, sizes


def _is_held_out(sizes: Integers, wish: float) -> NDArray[np.bool_]:
    """Select prompts that have as close to `wish` pairs as possible. sizes: the pairs of each."""
    left, is_out = wish, np.zeros(len(sizes), np.bool_)
    for prompt, size in enumerate(sizes.tolist()):
        if size <= left:
            is_out[prompt], left = True, left - size
    smallest = np.where(is_out, sizes.sum() + 1, sizes).argmin()
    if sizes[smallest] < 2 * left:  # closer to the fraction with it than without
        is_out[smallest] = True
    return is_out
