"""Reference log-probs per pair on disk, by content: computed once, never again by anyone who asks the same question.

A question is the reference's identity (its weights, and whatever else changes the number) and the token ids of a pair
as they are fed. A folder holds the answers to one identity; every process appends records of fixed size to a file of
its own there, so that a crash loses at most the record it tore, which its checksum then gives away.

Legend: N pairs of the data set, b some of them.
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

FORMAT = 1  # of a record; raise it when the meaning of a cached number changes
RECORD = np.dtype([("key", "<u8", 2), ("logps", "<f8", 2), ("check", "<u8")])
Records = NDArray[np.void]

logger = logging.getLogger(__name__)


def cache_folder(root: Path, identity: dict[str, Any]) -> Path:
    """The folder for a reference of that identity (JSON-ready); its meta.json says what the identity was."""
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    folder = root / "reference_logps" / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"meta.{uuid.uuid4().hex}"
    unfinished.write_text(text)
    os.replace(unfinished, folder / "meta.json")
    return folder


class RefCache:
    """What is known of the pairs of one data set: "train", "eval", or "eval NAME" where there are several.

    A row that repeats another's tokens, or one of another set, has an answer of its own: whether it finds that
    answer must not depend on what other ranks have just written, or a resumed run would differ in the last bit. (It
    can where two runs that cut their micro-batches differently fill the same folder at the same time.)
    """

    def __init__(self, folder: Path, pairs: Pairs, data_set: str, keep_last: int | None) -> None:
        self.folder, self.pair_ids = folder, pairs.pair_ids
        self._keys = _keys(pairs, data_set, keep_last)
        self._order = self._keys[:, 0].argsort()
        self._logps = np.full((len(pairs), 2), np.nan)
        self._read: dict[Path, int] = {}  # bytes of each file that were taken in
        self._own: Path | None = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex}.logps"
        self.read()

    def only_read(self) -> None:
        """Write nothing from now on: what is added this process alone remembers."""
        self._own = None

    def read(self) -> None:
        """Take in what every process has written so far."""
        ascending = self._keys[self._order, 0]
        for path in sorted(self.folder.glob("*.logps")):  # the oldest first, whose answers stay
            records, end = _whole_records(path, self._read.get(path, 0))
            self._read[path] = end
            place = np.searchsorted(ascending, records["key"][:, 0]).clip(max=len(ascending) - 1)
            index = self._order[place]
            ours = (self._keys[index] == records["key"]).all(axis=1)
            news = ours & ~self._is_known(index)
            self._logps[index[news]] = records["logps"][news]

    def known(self, indices: Integers) -> torch.Tensor | None:
        """[2b] fp64, all chosen first, of the pairs at these indices; None unless every one is known."""
        found = self._logps[indices]
        return torch.from_numpy(found.T.flatten()) if np.isfinite(found).all() else None

    def unknown(self) -> Integers:
        """Indices of the pairs that are not known."""
        return np.flatnonzero(~self._is_known(np.arange(len(self._logps))))

    def add(self, pair_ids: torch.Tensor, logps: torch.Tensor) -> None:
        """Keep the log-probs [2b] of those pairs [b] that are not known: the first answer stays. They
        are in the file when this returns; where it cannot be written, the run goes on and this process remembers."""
        index = np.searchsorted(self.pair_ids, pair_ids.cpu().numpy())
        news = ~self._is_known(index)
        index = index[news]
        records = np.zeros(len(index), RECORD)
        records["key"], records["logps"] = self._keys[index], logps.cpu().view(2, -1).t().numpy()[news]
        records["check"] = _checks(records)
        self._logps[index] = records["logps"]
        if self._own is None:
            return
        try:
            with open(self._own, "ab") as file:
                file.write(records.tobytes())
        except OSError as error:
            logger.warning("%s cannot be written (%s): reference.cache goes on without it", self._own, error.strerror)
            self._own = None

    def _is_known(self, index: Integers) -> NDArray[np.bool_]:
        return np.isfinite(self._logps[index, 0]) & np.isfinite(self._logps[index, 1])


def _keys(pairs: Pairs, data_set: str, keep_last: int | None) -> NDArray[np.uint64]:
    """[N, 2]: the hash of each pair's tokens, mixed with its data set, where it is cut, and which repetition it is."""
    hashes = np.asarray(pairs.hashes)
    salt = np.frombuffer(hashlib.blake2b(f"{data_set} {keep_last}".encode(), digest_size=16).digest(), "<u8")
    by_hash = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    is_new = np.append(True, (hashes[by_hash[1:]] != hashes[by_hash[:-1]]).any(axis=1))
    place = np.arange(len(hashes))
    repetition = np.empty(len(hashes), np.uint64)
    repetition[by_hash] = place - np.maximum.accumulate(np.where(is_new, place, 0))
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        mixed = repetition * np.uint64(0x9E3779B97F4A7C15)
        return np.column_stack([scrambled(hashes[:, half] ^ (mixed + salt[half])) for half in (0, 1)])


def _whole_records(path: Path, start: int) -> tuple[Records, int]:
    """The records of a file from a byte on, those with a wrong checksum left out, and where the next one begins."""
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read()
    whole = len(data) - len(data) % RECORD.itemsize
    records = np.frombuffer(data[:whole], RECORD)
    return records[records["check"] == _checks(records)], start + whole


def _checks(records: Records) -> NDArray[np.uint64]:
    """A checksum of each record, so that a torn or overwritten one is not believed."""
    words = np.concatenate([records["key"], np.ascontiguousarray(records["logps"]).view("<u8")], axis=1)
    total = np.full(len(records), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for column in range(words.shape[1]):
            total = (total ^ words[:, column]) * np.uint64(0xBF58476D1CE4E5B9)
            total ^= total >> np.uint64(31)
    return total
