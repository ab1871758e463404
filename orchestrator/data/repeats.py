"""Count pairs that repeat or contradict each other, and evaluation pairs that are also
trained on.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from orchestrator.data.pairs import Pairs


def repeated(pairs: Pairs) -> int:
    """Count the pairs with the same tokens as an earlier one."""
    return len(pairs) - len(np.unique(_keys(pairs)))


def contradictory(pairs: Pairs) -> int:
    """Count the pairs that also exist with chosen and rejected swapped; such a pair of pairs counts
    once.
    """
    keys, first = np.unique(_keys(pairs), return_index=True)
    return int(np.isin(pairs.swapped[first], keys).sum()) // 2


def trained_on(held_out: Pairs, train: Pairs) -> int:
    """Count the evaluation pairs that are also training pairs, with chosen and rejected swapped or
    not.
    """
    return int(
        (np.isin(_keys(held_out), _keys(train)) | np.isin(held_out.swapped, _keys(train))).sum()
    )


def repeat_counts(train: Pairs, held_out: Mapping[str, Pairs]) -> dict[str, int]:
    """Return the counts that are not 0, by their label, the text before ": N"."""
    contradictions = "training pairs that contradict another one (chosen and rejected are swapped)"
    counts = {
        "training pairs that repeat an earlier one": repeated(train),
        contradictions: contradictory(train),
    }
    for name, pairs in held_out.items():
        counts[f"{name} evaluation pairs that are also training pairs".lstrip()] = trained_on(
            pairs, train
        )
    return {words: count for words, count in counts.items() if count}


def repeat_lines(train: Pairs, held_out: Mapping[str, Pairs]) -> Iterator[str]:
    """Yield one line with the counts, if any is not 0."""
    if counts := repeat_counts(train, held_out):
        yield "; ".join(f"{words}: {count}" for words, count in counts.items())


def _keys(pairs: Pairs) -> np.ndarray:
    """Return a 64-bit hash of the tokens of each pair, enough for counting."""
    return np.asarray(pairs.hashes[:, 0])
