"""Hold out some of the training pairs for evaluation (data.eval_fraction)."""

import hashlib

import numpy as np

from orchestrator.data.pairs import COUNTED, Pairs
from orchestrator.settings.errors import UserError


def without_held_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split pairs into (training pairs, evaluation pairs): hold out all pairs of some prompts,
    chosen by a hash of their tokens and the seed, as close to the fraction as possible.

    Raises:
        UserError: a training set or the evaluation set would be empty.
    """
    key = str(seed).encode()
    hashes = (
        hashlib.blake2b(prompt, digest_size=8, key=key).digest() for prompt in pairs.prompts()
    )
    _, prompts, sizes = np.unique(
        np.frombuffer(b"".join(hashes), "<u8"), return_inverse=True, return_counts=True
    )
    left, is_out = fraction * len(pairs), np.zeros(len(sizes), np.bool_)
    for prompt, size in enumerate(sizes.tolist()):
        if size <= left:
            is_out[prompt], left = True, left - size
    smallest = np.where(is_out, len(pairs) + 1, sizes).argmin()
    if sizes[smallest] < 2 * left:  # closer to the fraction with it than without
        is_out[smallest] = True
    held = is_out[prompts]
    train, held_out = pairs.only(np.flatnonzero(~held)), pairs.only(np.flatnonzero(held))
    for name in COUNTED:  # counts of all rows, as dropped rows belong to neither part
        setattr(train, name, getattr(pairs, name))
    gone = next(
        (each for each, share in zip(pairs.sets, train.shares, strict=True) if not share.pairs),
        None,
    )
    if gone is not None or not len(held_out):
        which = f"every pair of {gone.source}" if gone else "none"
        rule = f"holds out {which}, of {len(pairs)} pairs with {len(sizes)} prompts"
        cure = (
            "lower it, or set data.eval to a file"
            if gone
            else "raise it, or set data.eval to a file"
        )
        raise UserError("data.eval_fraction", fraction, rule, cure)
    return train, held_out
