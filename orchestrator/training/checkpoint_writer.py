"""Write checkpoints: committed by their manifest, and independent of engine and world size.

A folder step_00000NNN holds one safetensors file per rank with flat ranges of named tensors,
`index.json` with the shapes and the place of each range, `meta.json` with everything else
(`Checkpointer.save`), written by rank 0, the random state of each rank, `pairs.parquet` with the
newest rows of the pair ledger, and `manifest.json` with the sha256 of every other file and of the
ledger's parts, renamed into place last. While it is written the folder is named
.step_00000NNN.TOKEN.partial, and is ignored by readers.
"""

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch

from orchestrator.durable import sync_folder, synced_sha256, write_atomically
from orchestrator.engines.base import SCALAR, Shard
from orchestrator.models.storage import save_tensors
from orchestrator.settings.errors import type_and_message
from orchestrator.training.ledger import Ledger, write_rows
from orchestrator.training.lossless_json import encode
from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    retain,
    sealed,
    step_folder,
)
from orchestrator.training.rng import RngState, rng_state
from orchestrator.world import World

# interval in seconds at which rank 0 checks for files that other ranks write in the background
POLL_S = 0.05


class SaveFailed(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


class RankState(NamedTuple):
    """The state of a rank that a checkpoint holds besides its shards."""

    rng: RngState | None = None  # default: the current random state
    seen: pa.Table | None = None  # rows for the pair ledger, which rank 0 holds


def save(
    checkpoints: Path,
    step: int,
    shards: Iterable[Shard],
    meta: dict[str, Any],
    world: World,
    state: RankState = RankState(),  # noqa: B008 - immutable
    ledger: Ledger | None = None,
) -> Path:
    """Write a checkpoint, each rank its part; it is committed when this returns on all ranks.

    ledger: on rank 0 only.
    A crash at any moment leaves either no manifest, and so no checkpoint, or a complete one.

    Raises:
        SaveFailed: on every rank if any of them failed, so that none waits for it.
    """
    draft = _Draft(checkpoints, step, meta, world, ledger)
    parts = draft.agreed(lambda: draft.write(shards, state.rng or rng_state(), state.seen))
    draft.agreed(lambda: draft.commit(parts) if world.is_main else None)
    return draft.final


class Saver:
    """Writer of a run's checkpoints, one at a time; `save` and `wait` are collective.

    In the background a thread of each rank writes its files and then a record of them, and the
    thread of rank 0 waits for all records, commits the checkpoint and deletes old ones. The threads
    call no collectives, because training runs its own meanwhile.
    """

    def __init__(
        self,
        checkpoints: Path,
        world: World,
        keep: int,
        timeout_s: float,
        ledger: Ledger | None = None,
    ) -> None:
        """Initialise the saver.

        keep: number of newest checkpoints to retain besides the best. timeout_s: that of the run's
        collectives. ledger: on rank 0 only.
        """
        self.checkpoints, self.world, self.ledger = checkpoints, world, ledger
        self.keep, self.timeout_s = keep, timeout_s
        self._draft: _Draft | None = None  # the checkpoint being written in the background
        self._thread = threading.Thread()
        self._given_up = threading.Event()
        # of this rank's thread, as text: an exception would keep its frames alive
        self._error: str | None = None
        self._committed: Path | None = None  # not popped yet

    def save(
        self,
        step: int,
        shards: Iterable[Shard],
        meta: dict[str, Any],
        state: RankState = RankState(),  # noqa: B008 - immutable
        in_background: bool = False,
        best: Path | None = None,
    ) -> None:
        """Wait for the previous save, then write a checkpoint like the function `save`.

        best: the best checkpoint so far, which is retained; may be this one.
        in_background: return once everything is copied to host memory; `wait` waits for the rest.

        Raises:
            SaveFailed: on every rank, for this save or the previous one.
        """
        self.wait()
        if not in_background:
            self._committed = save(
                self.checkpoints, step, shards, meta, self.world, state, self.ledger
            )
            if self.world.is_main:
                retain(self.checkpoints, self.keep, best)
            return
        draft = _Draft(self.checkpoints, step, meta, self.world, self.ledger)
        copies: list[Shard] = []
        draft.agreed(lambda: copies.extend(map(_on_host, shards)))
        self._draft, self._error = draft, None
        self._given_up.clear()
        state = RankState(state.rng or rng_state(), state.seen)
        args = (draft, copies, state, best)
        self._thread = threading.Thread(target=self._run, args=args, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in the background, if any, is committed.

        Raises:
            SaveFailed: on every rank if any of them failed.
        """
        if (draft := self._draft) is None:
            return
        if not self.world.is_main:
            self._thread.join()
        errors = self.world.gather(None if self.world.is_main else self._error)
        if self.world.is_main:  # by now the others have written their parts, or failed to
            if any(errors):
                self._given_up.set()
            self._thread.join(self.timeout_s / 2)  # the others wait in the next gather
            self.close()
        self._draft = None
        draft.check(errors + self.world.gather(self._error))
        if not self.world.is_main:
            self._committed = draft.final

    def pop_committed(self) -> Path | None:
        """Return (once) the checkpoint committed since the last call. Rank 0 sees it as soon as it
        commits; other ranks after wait().
        """
        # an unconditional reset could lose a value that the thread sets meanwhile
        if (committed := self._committed) is not None:
            self._committed = None
        return committed

    @property
    def is_writing(self) -> bool:
        """Return whether a save is written in the background at the moment."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Join the background thread: one that runs torch code when the interpreter exits would
        abort the process.

        This rank's part is still written, but this does not wait for other ranks.
        """
        self._given_up.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(
        self, draft: "_Draft", copies: list[Shard], state: RankState, best: Path | None
    ) -> None:
        try:
            self._write(draft, copies, state)
            if self.world.is_main:
                self._commit(draft, best)
        except Exception as failure:
            self._error = draft.failure_line(failure)
            if self.world.is_main:
                draft.remove()

    def _write(self, draft: "_Draft", copies: list[Shard], state: RankState) -> None:
        """Write this rank's files, then a record of them or of the failure."""
        try:
            draft.record(draft.write(copies, state.rng or rng_state(), state.seen))
        except Exception as failure:
            if not self.world.is_main and not draft.partial.exists():
                return  # rank 0 has aborted the save, and reports why
            draft.remove_part()  # frees space for the record on a full disk
            with suppress(OSError):  # without a record, rank 0 finds the failure in `wait`
                draft.record({"error": draft.failure_line(failure)})
            raise
        finally:
            copies.clear()  # frees their memory while rank 0 waits

    def _commit(self, draft: "_Draft", best: Path | None) -> None:
        parts = [self._recorded(draft, rank) for rank in range(self.world.size)]
        draft.commit(parts)
        self._committed = draft.final
        retain(self.checkpoints, self.keep, best)

    def _recorded(self, draft: "_Draft", rank: int) -> dict[str, Any]:
        """Wait for a rank's record, delete it, because it is not part of the checkpoint, and return
        its content.
        """
        path = draft.record_of(rank)
        while not path.exists():
            if self._given_up.wait(POLL_S) and not path.exists():
                raise TimeoutError(f"rank {rank} has not written its part")
        record = json.loads(path.read_text())
        path.unlink()
        if "error" in record:
            raise OSError(record["error"])
        return record


# --- writing --------------------------------------------------------------------------------------


class _Draft:
    """A checkpoint being written, in a temporary folder. Its constructor is collective, and an
    error of one rank is raised on all.
    """

    def __init__(
        self,
        checkpoints: Path,
        step: int,
        meta: dict[str, Any],
        world: World,
        ledger: Ledger | None = None,
    ) -> None:
        self.checkpoints, self.step, self.world, self.ledger = checkpoints, step, world, ledger
        self.final = step_folder(checkpoints, step)
        # a name that no other attempt has, so that ranks of a dead attempt cannot write into it
        self.partial = checkpoints / f".{self.final.name}.{secrets.token_hex(4)}.partial"
        self.meta = ""  # on rank 0: text, because its objects change before it is written
        names = self.agreed(lambda: self._begin(meta) if world.is_main else "")
        self.partial = checkpoints / names[0]

    def _begin(self, meta: dict[str, Any]) -> str:
        self.meta = json.dumps(encode({**meta, "step": self.step, "world_size": self.world.size}))
        # from a crash, or corrupt
        for leftover in (self.final, *self.checkpoints.glob(".step_*.partial")):
            shutil.rmtree(leftover, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return self.partial.name

    def agreed(self, part: Callable[[], Any]) -> list[Any]:
        """Call `part` on every rank and return the results of all; raise SaveFailed on all ranks if
        one failed.
        """
        try:
            done, error = part(), None
        except Exception as failure:  # a full disk may raise an OSError or a SafetensorError
            done, error = None, self.failure_line(failure)
        every = self.world.gather((done, error))
        self.check([error for _, error in every])
        return [done for done, _ in every]

    def failure_line(self, failure: Exception) -> str:
        return f"rank {self.world.rank}: {type_and_message(failure)}"

    def check(self, errors: list[str | None]) -> None:
        """Remove the draft and raise SaveFailed if a rank has an error; the same on all ranks."""
        if failures := [error for error in errors if error]:
            if self.world.is_main:
                self.remove()  # frees its space on a full disk
            reason = f"the checkpoint of step {self.step} could not be written ({failures[0]})"
            raise SaveFailed(f"{reason}; free space in {self.checkpoints}")

    def remove(self) -> None:
        gone = self.partial.with_suffix(".gone.partial")
        with suppress(OSError):  # it is gone already
            # atomic: other ranks find either the whole folder or none
            os.rename(self.partial, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def write(
        self, shards: Iterable[Shard], rng: RngState, seen: pa.Table | None = None
    ) -> dict[str, Any]:
        """Write this rank's tensors, random state and rows; return their record for rank 0."""
        file, rng_file, seen_file = _rank_files(self.world.rank)
        shapes: dict[str, tuple[int, ...]] = {}
        pieces: list[tuple[str, str, int, int, torch.Tensor]] = []
        for part in shards:
            shapes[part.name] = part.shape
            for key, value in part.tensors.items():
                # a scalar, or state of another shape
                is_whole = key.startswith(SCALAR) or value.numel() != part.stop - part.start
                begin, end = (0, value.numel()) if is_whole else (part.start, part.stop)
                # no copy if it is on the host already
                pieces.append((part.name, key, begin, end, value.cpu().contiguous()))
        pieces.sort(key=lambda piece: piece[:3])  # equal state gives equal files
        tensors = {str(label): piece[-1] for label, piece in enumerate(pieces)}
        ranges = [(file, str(label), *piece[:-1]) for label, piece in enumerate(pieces)]
        save_tensors(tensors, self.partial / file)
        save_tensors(rng, self.partial / rng_file)
        files = {name: synced_sha256(self.partial / name) for name in (file, rng_file)}
        if seen is not None:
            write_rows(seen, self.partial / seen_file)
        return {
            "shapes": dict(sorted(shapes.items())),
            "ranges": ranges,
            "files": files,
            "seen": [] if seen is None else [seen_file],
        }

    def remove_part(self) -> None:
        for name in _rank_files(self.world.rank):
            (self.partial / name).unlink(missing_ok=True)

    def record_of(self, rank: int) -> Path:
        return self.partial / f"rank_{rank:05d}.json"

    def record(self, record: dict[str, Any]) -> None:
        """Write this rank's record for rank 0."""
        write_atomically(self.record_of(self.world.rank), json.dumps(record))

    def commit(self, parts: list[dict[str, Any]]) -> None:
        """Commit the checkpoint after all parts are written; on rank 0 only."""
        shapes = {name: shape for part in parts for name, shape in part["shapes"].items()}
        ranges = [entry for part in parts for entry in part["ranges"]]
        files = {name: digest for part in parts for name, digest in part["files"].items()}
        if self.ledger is not None:
            rows = [name for part in parts for name in part["seen"]]
            tail = self.ledger.join(self.partial, rows)
            files |= {name: synced_sha256(self.partial / name) for name in tail}
        index = json.dumps({"shapes": shapes, "ranges": ranges})
        for name, document in (("index.json", index), ("meta.json", self.meta)):
            (self.partial / name).write_text(document)
            files[name] = synced_sha256(self.partial / name)
        os.rename(self.partial, self.final)
        sync_folder(self.checkpoints)
        ledger = {} if self.ledger is None else self.ledger.parts
        manifest = {"format": FORMAT, "step": self.step, "files": files, "ledger": ledger}
        write_atomically(self.final / MANIFEST, json.dumps(sealed(manifest), indent=1))
        sync_folder(self.final)
        if self.ledger is not None:
            self.ledger.show(self.final)


def _on_host(part: Shard) -> Shard:
    """Copy the tensors of a range to host memory."""

    def copied(value: torch.Tensor) -> torch.Tensor:
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    return part._replace(tensors={key: copied(value) for key, value in part.tensors.items()})


def _rank_files(rank: int) -> tuple[str, str, str]:
    return (
        f"rank_{rank:05d}.safetensors",
        f"rng_{rank:05d}.safetensors",
        f"pairs_{rank:05d}.parquet",
    )
