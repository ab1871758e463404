"""The pair ledger: log-probs, margin and loss of every pair in every step, as rows of
RUN_DIR/pairs.parquet.

Each rank keeps the rows of its steps (seen_pairs.py) and writes them with the next save. Rank 0
(`Ledger`) appends those of all ranks to the tail, a file in the folder of the checkpoint, so that
both are committed or neither is. When the tail has PART_ROWS, the next save moves it to a part in
RUN_DIR/pairs.parquet, which later manifests list and which is not deleted with a checkpoint. A copy
of the newest tail is kept beside the parts, so that a reader of the whole folder, such as pandas,
finds each row once.
"""

import logging
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.durable import sync_folder, synced_sha256
from orchestrator.settings.errors import UserError
from orchestrator.training.manifest import (
    ManifestFiles,
    ReadFailed,
    committed,
    differing,
    listed_in,
    step_of,
)
from orchestrator.training.rundir import NEWEST_PAIRS, RunDir

logger = logging.getLogger(__name__)

# as in StepOutput
NUMBERS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "loss")
SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        # optimizer steps including this one; the numbers are from before its update
        ("step", pa.int32()),
        ("epoch", pa.int32()),  # from 0
        ("chosen_logps", pa.float64()),  # nats, summed over the completion, as are the next three
        ("rejected_logps", pa.float64()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("margin", pa.float64()),  # of the rewards
        # the pair's term in the mean over the global batch, without its weight
        ("loss", pa.float64()),
        ("chosen_tokens", pa.int32()),  # of the completion
        ("rejected_tokens", pa.int32()),
    ]
)
TAIL = "pairs.parquet"  # in a checkpoint's folder
PART_ROWS = 2**16  # about 3 MB
READS = 3  # attempts to read: a run may delete checkpoints meanwhile


def _each_once(table: pa.Table) -> pa.Table:
    """Sort the rows, so that their order does not depend on the number of ranks, and drop the
    second, equal row of a pair that occurs twice in a step, as with a data set of weight above 1.
    """
    ordered = table.sort_by([("step", "ascending"), ("pair_id", "ascending")])
    keys = np.stack([ordered["step"].to_numpy(), ordered["pair_id"].to_numpy()])
    return ordered.filter(np.diff(keys, prepend=-1).any(axis=0))


def write_rows(table: pa.Table, path: Path) -> None:
    """Write one Parquet file of about 50 bytes a row; byte-stream split, because similar fp64
    numbers share their first bytes.
    """
    pq.write_table(
        table, path, compression="zstd", use_dictionary=False, use_byte_stream_split=True
    )


class Ledger:
    """The rows of all ranks, on rank 0, in the thread that commits checkpoints."""

    def __init__(self, folder: Path) -> None:
        """Initialise an empty ledger. folder: RUN_DIR/pairs.parquet."""
        self.folder = folder
        self.parts: dict[str, str] = {}  # names and sha256, for the next manifest
        self._tail = SCHEMA.empty_table()

    def go_on(self, checkpoint: Path | None) -> None:
        """Continue from a checkpoint, or from the start of the run (None): delete later rows, which
        will be written again.
        """
        if checkpoint is not None:
            listed = listed_in(checkpoint)
            assert listed is not None, "a resumed checkpoint was verified"
            self.parts, self._tail = listed.parts, _tail_of(checkpoint, listed)
        for path in (
            *self.folder.glob("steps_*.parquet"),
            *self.folder.glob(".*.partial"),
            self.folder / NEWEST_PAIRS,
        ):
            if path.name not in self.parts:
                path.unlink(missing_ok=True)
        if checkpoint is not None:
            self.show(checkpoint)
            for line in _damaged(self.folder, self.parts).values():
                logger.warning("%s: its rows of the pair ledger are lost", line)

    def join(self, draft: Path, names: list[str]) -> list[str]:
        """Replace the rows that ranks wrote into these files of a draft by the tail; return the
        names of its files.
        """
        # the newest checkpoint has it, without the rows of this one
        if self._tail.num_rows >= PART_ROWS:
            self._make_part()
        new = pa.concat_tables([SCHEMA.empty_table(), *(_read(draft / name) for name in names)])
        for name in names:
            (draft / name).unlink()
        self._tail = pa.concat_tables([self._tail, _each_once(new)])
        if not self._tail.num_rows:
            return []
        write_rows(self._tail, draft / TAIL)
        return [TAIL]

    def show(self, checkpoint: Path) -> None:
        """Copy the tail of a checkpoint, now the newest, to the folder of the parts."""
        if self._tail.num_rows:
            self.folder.mkdir(exist_ok=True)
            partial = self.folder / f".{NEWEST_PAIRS}.{secrets.token_hex(4)}.partial"
            shutil.copyfile(checkpoint / TAIL, partial)
            os.replace(partial, self.folder / NEWEST_PAIRS)

    def _make_part(self) -> None:
        first, last = (self._tail["step"][at].as_py() for at in (0, -1))
        # a name that no other attempt has: an attempt considered dead may still write
        name = f"steps_{first:08d}_{last:08d}.{secrets.token_hex(4)}.parquet"
        partial = self.folder / f".{name}.partial"
        self.folder.mkdir(exist_ok=True)
        write_rows(self._tail, partial)
        self.parts = {**self.parts, name: synced_sha256(partial)}
        # first: a crash in between leaves no duplicate rows
        (self.folder / NEWEST_PAIRS).unlink(missing_ok=True)
        os.replace(partial, self.folder / name)
        sync_folder(self.folder)
        self._tail = SCHEMA.empty_table()


def read(run_dir: RunDir) -> tuple[int, pa.Table]:
    """Return the step of the newest checkpoint and all rows up to it, sorted by step, without those
    of damaged files, which a warning names.

    The run may still be training.

    Raises:
        UserError: there is no checkpoint yet.
        ReadFailed: no checkpoint is readable.
    """
    failure: Exception | None = None
    for _ in range(READS):
        for checkpoint in committed(run_dir.checkpoints):
            try:
                return step_of(checkpoint), _rows_of(run_dir, checkpoint)
            except (OSError, pa.ArrowException) as error:  # an older checkpoint may be readable
                failure = failure or error
        if failure is None:
            cure = "wait for its first save (checkpoint.every_steps) or for its end"
            raise UserError(
                "RUN_DIR",
                str(run_dir.path),
                "has no checkpoint yet; each save writes its rows",
                cure,
            )
    raise ReadFailed(f"the pair ledger of {run_dir.path} cannot be read ({failure})")


def verify(run_dir: RunDir) -> list[str] | None:
    """Return the defects of the parts that the newest manifest lists, one line each; None if it
    lists none.
    """
    for checkpoint in committed(run_dir.checkpoints):
        with suppress(UserError):  # another format
            if (listed := listed_in(checkpoint)) is not None:
                return differing(run_dir.pairs, listed.parts) if listed.parts else None
    return None


def _rows_of(run_dir: RunDir, checkpoint: Path) -> pa.Table:
    listed = listed_in(checkpoint)
    if listed is None:
        raise ReadFailed(f"{checkpoint} has no readable manifest")
    damaged = _damaged(run_dir.pairs, listed.parts)
    for line in damaged.values():
        logger.warning("%s: its rows are left out", line)
    parts = [_read(run_dir.pairs / name) for name in sorted(listed.parts.keys() - damaged.keys())]
    return pa.concat_tables([*parts, _tail_of(checkpoint, listed)])


def _damaged(folder: Path, parts: dict[str, str]) -> dict[str, str]:
    """Return one line for each part that is missing, damaged or unreadable, by its name."""
    lines: dict[str, str] = {}
    for name, digest in parts.items():
        try:
            for line in differing(folder, {name: digest}):
                lines[name] = line
        except ReadFailed as error:
            lines[name] = str(error)
    return lines


def _tail_of(checkpoint: Path, listed: ManifestFiles) -> pa.Table:
    return _read(checkpoint / TAIL) if TAIL in listed.files else SCHEMA.empty_table()


def _read(path: Path) -> pa.Table:
    # pq.read_table would treat a folder named lr=1e-6 as a column
    with pq.ParquetFile(path) as file:
        return file.read()
