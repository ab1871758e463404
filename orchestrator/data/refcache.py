"""Cache reference log-probs of pairs on disk, keyed by content.

The key is the reference's identity (its weights, and all else that changes the log-probs) and the
token ids of a pair after truncation. There is one folder per identity; every process appends
records of fixed size to its own file in it, so a crash loses at most the record being written,
which fails its checksum.

Shapes: N pairs of the data set, b some of them.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.data.order import Integers, scrambled
from orchestrator.data.pairs import Pairs

FORMAT = 1  # of a record; increase it when the meaning of a cached number changes
RECORD = np.dtype([("key", "<u8", 2), ("logps", "<f8", 2), ("check", "<u8")])
Records = NDArray[np.void]

logger = logging.getLogger(__name__)


def cache_folder(root: Path, identity: dict[str, Any]) -> Path:
    """Create and return the folder for a reference identity (JSON-serialisable), which its
    meta.json documents.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    folder = root / "reference_logps" / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"meta.{uuid.uuid4().hex}"
    unfinished.write_text(text)
    os.replace(unfinished, folder / "meta.json")
    return folder


class RefCache:
    """Cached log-probs of the pairs of one data set: "train", "eval", or "eval NAME" with several.

    A row with the same tokens as another one, or as one of another set, has its own entry: whether
    it is found must not depend on what other ranks have just written, or a resumed run would differ
    in the last bit. (It can when two runs with different micro-batches fill the same folder at the
    same time.)
    """

    def __init__(self, folder: Path, pairs: Pairs, data_set: str, keep_last: int | None) -> None:
        self.folder, self.pair_ids = folder, pairs.pair_ids
        self._keys = _keys(pairs, data_set, keep_last)
        self._order = self._keys[:, 0].argsort()
        self._logps = np.full((len(pairs), 2), np.nan)
        self._read: dict[Path, int] = {}  # bytes read of each file
        self._own: Path | None = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex}.logps"
        self.read()

    def only_read(self) -> None:
        """Stop writing to disk: entries added later are kept only in this process."""
        self._own = None

    def read(self) -> None:
        """Read all that any process has written so far."""
        ascending = self._keys[self._order, 0]
        # oldest first: the first entry of a pair wins
        for path in sorted(self.folder.glob("*.logps")):
            records, end = _whole_records(path, self._read.get(path, 0))
            self._read[path] = end
            place = np.searchsorted(ascending, records["key"][:, 0]).clip(max=len(ascending) - 1)
            index = self._order[place]
            ours = (self._keys[index] == records["key"]).all(axis=1)
            news = ours & ~self._is_known(index)
            self._logps[index[news]] = records["logps"][news]

    def known(self, indices: Integers) -> torch.Tensor | None:
        """Return log-probs [2b] fp64, all chosen first, of the pairs at these indices; None if any
        is unknown.
        """
        logps = self._logps[indices]
        return torch.from_numpy(logps.T.flatten()) if np.isfinite(logps).all() else None

    def unknown(self) -> Integers:
        """Return the indices of the pairs without cached log-probs."""
        return np.flatnonzero(~self._is_known(np.arange(len(self._logps))))

    def add(self, pair_ids: torch.Tensor, logps: torch.Tensor) -> None:
        """Add the log-probs [2b] of those pairs [b] that are not known yet: the first entry wins.

        They are on disk when this returns; if the file cannot be written, only this process keeps
        them.
        """
        index = np.searchsorted(self.pair_ids, pair_ids.cpu().numpy())
        news = ~self._is_known(index)
        index = index[news]
        records = np.zeros(len(index), RECORD)
        records["key"] = self._keys[index]
        records["logps"] = logps.cpu().view(2, -1).t().numpy()[news]
        records["check"] = _checks(records)
        self._logps[index] = records["logps"]
        if self._own is None:
            return
        try:
            with open(self._own, "ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): reference.cache continues without it",
                self._own,
                error.strerror,
            )
            self._own = None

    def _is_known(self, index: Integers) -> NDArray[np.bool_]:
        return np.isfinite(self._logps[index, 0]) & np.isfinite(self._logps[index, 1])


def _keys(pairs: Pairs, data_set: str, keep_last: int | None) -> NDArray[np.uint64]:
    """Return keys [N, 2]: the hash of each pair's tokens, data set, `keep_last` and number of
    earlier repetitions.
    """
    hashes = np.asarray(pairs.hashes)
    salt = np.frombuffer(
        hashlib.blake2b(f"{data_set} {keep_last}".encode(), digest_size=16).digest(), "<u8"
    )
    by_hash = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    is_new = np.append(True, (hashes[by_hash[1:]] != hashes[by_hash[:-1]]).any(axis=1))
    place = np.arange(len(hashes))
    repetition = np.empty(len(hashes), np.uint64)
    repetition[by_hash] = place - np.maximum.accumulate(np.where(is_new, place, 0))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        mixed = repetition * np.uint64(0x9E3779B97F4A7C15)
        return np.column_stack(
            [scrambled(hashes[:, half] ^ (mixed + salt[half])) for half in (0, 1)]
        )


def _whole_records(path: Path, start: int) -> tuple[Records, int]:
    """Return the records of a file from byte `start` on with a right checksum, and the byte where
    to continue.
    """
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read()
    whole = len(data) - len(data) % RECORD.itemsize
    records = np.frombuffer(data[:whole], RECORD)
    return records[records["check"] == _checks(records)], start + whole


def _checks(records: Records) -> NDArray[np.uint64]:
    """Return a checksum of each record, which detects torn or overwritten records."""
    words = np.concatenate(
        [records["key"], np.ascontiguousarray(records["logps"]).view("<u8")], axis=1
    )
    total = np.full(len(records), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is intended
        for column in range(words.shape[1]):
            total = (total ^ words[:, column]) * np.uint64(0xBF58476D1CE4E5B9)
            total ^= total >> np.uint64(31)
    return total
