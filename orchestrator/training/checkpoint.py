"""Write and read checkpoints, which are committed by their manifest and independent of engine and
world size.

A folder step_00000NNN holds one safetensors file per rank with flat ranges of named tensors,
`index.json` with the shapes and the place of each range, `meta.json` with everything that is the
same on all ranks, the random state of each rank, and `manifest.json` with the sha256 of every other
file, renamed into place last. While it is written the folder is named .step_00000NNN.TOKEN.partial,
and is ignored by readers.
"""

import json
import logging
import os
import random
import secrets
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.engines.base import SCALAR, Shard
from orchestrator.models.storage import save_tensors
from orchestrator.settings.errors import UserError
from orchestrator.training.ledger import Ledger, write_rows
from orchestrator.training.manifest import (
    FORMAT,
    MANIFEST,
    ReadFailed,
    committed,
    retain,
    set_aside,
    step_folder,
    sync_folder,
    synced_sha256,
    verify,
)
from orchestrator.training.rundir import RunDir, write_atomically
from orchestrator.world import World

logger = logging.getLogger(__name__)

# interval in seconds at which rank 0 checks for files that other ranks write in the background
POLL_S = 0.05
RngState = dict[str, torch.Tensor]


class CorruptCheckpoint(Exception):
    """A checkpoint lacks a part of a tensor."""


class SaveFailed(OSError):
    """A checkpoint could not be written; earlier ones are untouched."""


def save(
    checkpoints: Path,
    step: int,
    owned: Iterable[Shard],
    meta: dict[str, Any],
    world: World,
    rng: RngState | None = None,
    seen: pa.Table | None = None,
    ledger: Ledger | None = None,
) -> Path:
    """Write a checkpoint, each rank its part; it is committed when this returns on all ranks.

    rng: this rank's random state to save; default: the current one.
    seen: rows of this rank for the pair ledger, which rank 0 holds.
    A crash at any moment leaves either no manifest, and so no checkpoint, or a complete one.

    Raises:
        SaveFailed: on every rank if any of them failed, so that none waits for it.
    """
    draft = _Draft(checkpoints, step, meta, world, ledger)
    parts = draft.agreed(lambda: draft.write(owned, rng or rng_state(), seen))
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
        self.checkpoints, self.world, self.keep, self.timeout_s = (
            checkpoints,
            world,
            keep,
            timeout_s,
        )
        self.ledger = ledger
        self._draft: _Draft | None = None  # the checkpoint being written in the background
        self._thread = threading.Thread()
        self._given_up = threading.Event()
        self._error: str | None = (
            None  # of this rank's thread, as text: an exception would keep its frames alive
        )
        self._news: Path | None = None

    def save(
        self,
        step: int,
        owned: Iterable[Shard],
        meta: dict[str, Any],
        rng: RngState | None = None,
        in_background: bool = False,
        best: Path | None = None,
        seen: pa.Table | None = None,
    ) -> None:
        """Wait for the previous save, then write a checkpoint like the function `save`.

        best: the best checkpoint so far, which is retained; may be this one.
        in_background: return once everything is copied to host memory; `wait` waits for the rest.

        Raises:
            SaveFailed: on every rank, for this save or the previous one.
        """
        self.wait()
        if not in_background:
            self._news = save(
                self.checkpoints, step, owned, meta, self.world, rng, seen, self.ledger
            )
            if self.world.is_main:
                retain(self.checkpoints, self.keep, best)
            return
        draft = _Draft(self.checkpoints, step, meta, self.world, self.ledger)
        copies: list[Shard] = []
        draft.agreed(lambda: copies.extend(map(_copied, owned)))
        self._draft, self._error = draft, None
        self._given_up.clear()
        given = (draft, copies, rng or rng_state(), seen, best)
        self._thread = threading.Thread(target=self._run, args=given, name="checkpoint")
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
            self._news = draft.final

    def pop_committed(self) -> Path | None:
        """Return (once) the checkpoint committed since the last call. Rank 0 sees it as soon as it
        commits; other ranks after wait().
        """
        if (
            news := self._news
        ) is not None:  # an unconditional reset could lose a value that the thread sets meanwhile
            self._news = None
        return news

    def close(self) -> None:
        """Join the background thread: one that runs torch code when the interpreter exits would
        abort the process.

        This rank's part is still written, but this does not wait for other ranks.
        """
        self._given_up.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(
        self,
        draft: "_Draft",
        copies: list[Shard],
        rng: RngState,
        seen: pa.Table | None,
        best: Path | None,
    ) -> None:
        try:
            self._write(draft, copies, rng, seen)
            if self.world.is_main:
                self._commit(draft, best)
        except Exception as failure:
            self._error = draft.told(failure)
            if self.world.is_main:
                draft.remove()

    def _write(
        self, draft: "_Draft", copies: list[Shard], rng: RngState, seen: pa.Table | None
    ) -> None:
        """Write this rank's files, then a record of them or of the failure."""
        try:
            draft.record(draft.write(copies, rng, seen))
        except Exception as failure:
            if not self.world.is_main and not draft.partial.exists():
                return  # rank 0 has aborted the save, and reports why
            draft.remove_part()  # frees space for the record on a full disk
            with suppress(OSError):  # without a record, rank 0 finds the failure in `wait`
                draft.record({"error": draft.told(failure)})
            raise
        finally:
            copies.clear()  # frees their memory while rank 0 waits

    def _commit(self, draft: "_Draft", best: Path | None) -> None:
        parts = [self._recorded(draft, rank) for rank in range(self.world.size)]
        draft.commit(parts)
        self._news = draft.final
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


def newest_valid(checkpoints: Path, world: World) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint and the defects of newer ones.

    Collective: ranks share the files to check.

    Raises:
        UserError: a newer one has another format: resuming from an older one would lose its steps.
        ReadFailed: a newer one cannot be read at the moment.
    """
    complaints: list[str] = []
    for folder in _lists_of_ranks(world, lambda: committed(checkpoints) if world.is_main else []):
        wrong = _lists_of_ranks(world, verify, folder, (world.rank, world.size))
        if not wrong:
            return folder, complaints
        complaints += dict.fromkeys(wrong)  # every rank reads the manifest
    return None, complaints


def newest_to_resume(run_dir: RunDir, world: World) -> Path | None:
    """Return the checkpoint to resume from, and disable newer ones that are not complete.
    Collective.

    Raises:
        UserError: no checkpoint of the run is complete, or as in `newest_valid`.
    """
    newest, complaints = newest_valid(run_dir.checkpoints, world)
    if complaints and newest is None:
        rule = f"has checkpoints, but none is complete ({complaints[0]})"
        start_over = f"or remove {run_dir.checkpoints} to start over"
        cure = f"restore their files, or choose another run.name, {start_over}"
        raise UserError("run.dir", str(run_dir.path), rule, cure)
    if newest is not None and complaints and world.is_main:
        for line in complaints:
            logger.warning("%s; an older checkpoint is used", line)
        set_aside(run_dir.checkpoints, newest)
    return newest


def _lists_of_ranks(world: World, part: Callable[..., list[Any]], *args: Any) -> list[Any]:
    """Call `part` on every rank and return the concatenated lists. An error of one rank is raised
    on all, so that none waits for it.
    """
    try:
        mine, failure = part(*args), None
    except (UserError, ReadFailed) as error:
        mine, failure = (
            [],
            (type(error), error.args),
        )  # the exception itself would keep the frames of run() alive
    every = world.gather((mine, failure))
    for _, failure in every:
        if failure is not None:
            raise failure[0](*failure[1])
    return [item for items, _ in every for item in items]


class Reader:
    """Reader of tensor ranges of a verified checkpoint: lazy, and independent of the ranks that
    wrote them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = _decoded(json.loads((folder / "meta.json").read_text()))
        index = json.loads((folder / "index.json").read_text())
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in index["shapes"].items()
        }
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str, str]]] = defaultdict(list)
        for file, tensor, name, key, start, stop in index["ranges"]:
            self._ranges[name, key].append((start, stop, file, tensor))
        self._keys: dict[str, set[str]] = defaultdict(set)
        for name, key in self._ranges:
            self._keys[name].add(key)
        self._files: dict[str, Any] = {}

    def keys(self, name: str) -> set[str]:
        """Return the keys ("param", "exp_avg", ...) that the checkpoint has for a parameter."""
        return set(self._keys.get(name, ()))

    def read(self, name: str, key: str, start: int, stop: int) -> torch.Tensor:
        """Return the flat range [start, stop) of a tensor, 1-D on the CPU.

        Raises:
            CorruptCheckpoint: a part of the range is in no file.
        """
        pieces, at = [], start
        for begin, end, file, tensor in sorted(self._ranges.get((name, key), [])):
            if begin <= at < end and at < stop:
                upto = min(end, stop)
                pieces.append(self._file(file).get_slice(tensor)[at - begin : upto - begin])
                at = upto
        if at < stop:
            raise CorruptCheckpoint(
                f"{self.folder}: elements {at} to {stop} of {key} of {name} are missing"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [torch.zeros(0)])

    def parameter(self, name: str) -> torch.Tensor:
        """Return one whole parameter in its shape."""
        shape = self.shapes[name]
        return self.read(name, "param", 0, int(np.prod(shape, dtype=np.int64))).view(shape)

    def restore_rng(self, world: World, seed: int) -> None:
        """Restore this rank's random state; at another world size, seed a new one from seed, step
        and rank.
        """
        if self.meta["world_size"] != world.size:
            seed_everything(seed + 1_000_003 * self.meta["step"] + world.rank)
            return
        set_rng_state(load_file(self.folder / f"rng_{world.rank:05d}.safetensors"), world.device)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, "pt")
        return self._files[name]


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
        self.meta = json.dumps(_encoded({**meta, "step": self.step, "world_size": self.world.size}))
        for leftover in (
            self.final,
            *self.checkpoints.glob(".step_*.partial"),
        ):  # from a crash, or corrupt
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
            done, error = None, self.told(failure)
        every = self.world.gather((done, error))
        self.check([error for _, error in every])
        return [done for done, _ in every]

    def told(self, failure: Exception) -> str:
        return f"rank {self.world.rank}: {type(failure).__name__}: {failure}"

    def check(self, errors: list[str | None]) -> None:
        """Remove the draft and raise SaveFailed if a rank has an error; the same on all ranks."""
        if found := [error for error in errors if error]:
            if self.world.is_main:
                self.remove()  # frees its space on a full disk
            reason = f"the checkpoint of step {self.step} could not be written ({found[0]})"
            raise SaveFailed(f"{reason}; free space in {self.checkpoints}")

    def remove(self) -> None:
        gone = self.partial.with_suffix(".gone.partial")
        with suppress(OSError):  # it is gone already
            os.rename(
                self.partial, gone
            )  # atomic: other ranks find either the whole folder or none
        shutil.rmtree(gone, ignore_errors=True)

    def write(
        self, owned: Iterable[Shard], rng: RngState, seen: pa.Table | None = None
    ) -> dict[str, Any]:
        """Write this rank's tensors, random state and rows; return their record for rank 0."""
        file, rng_file, seen_file = _rank_files(self.world.rank)
        tensors: dict[str, torch.Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        ranges: list[tuple[str, str, str, str, int, int]] = []
        for part in owned:
            shapes[part.name] = part.shape
            for key, value in part.tensors.items():
                label = str(len(tensors))
                tensors[label] = value.cpu().contiguous()  # no copy if it is on the host already
                is_whole = (
                    key.startswith(SCALAR) or value.numel() != part.stop - part.start
                )  # another shape
                begin, end = (0, value.numel()) if is_whole else (part.start, part.stop)
                ranges.append((file, label, part.name, key, begin, end))
        save_tensors(tensors, self.partial / file)
        save_tensors(rng, self.partial / rng_file)
        files = {name: synced_sha256(self.partial / name) for name in (file, rng_file)}
        if seen is not None:
            write_rows(seen, self.partial / seen_file)
        return {
            "shapes": shapes,
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
            joined = self.ledger.join(
                self.partial, [name for part in parts for name in part["seen"]]
            )
            files |= {name: synced_sha256(self.partial / name) for name in joined}
        index = json.dumps({"shapes": shapes, "ranges": ranges})
        for name, document in (("index.json", index), ("meta.json", self.meta)):
            (self.partial / name).write_text(document)
            files[name] = synced_sha256(self.partial / name)
        os.rename(self.partial, self.final)
        sync_folder(self.checkpoints)
        ledger = {} if self.ledger is None else self.ledger.parts
        manifest = json.dumps(
            {"format": FORMAT, "step": self.step, "files": files, "ledger": ledger}, indent=1
        )
        write_atomically(self.final / MANIFEST, manifest)
        sync_folder(self.final)
        if self.ledger is not None:
            self.ledger.show(self.final)


def _copied(part: Shard) -> Shard:
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


def rng_state() -> RngState:
    """Return the random state of this process: torch (CPU and GPU), numpy, Python."""
    name, words, position, *gauss = np.random.get_state()
    assert name == "MT19937", "numpy's global generator is always this one"
    assert not isinstance(words, str)
    python = json.dumps(random.getstate()).encode()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.append(words.astype(np.int64), position)),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.frombuffer(bytearray(python), dtype=torch.uint8),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Restore a result of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    words = state["numpy"].numpy().astype(np.uint32)
    has_gauss, cached = state["numpy_gauss"].tolist()  # randn draws two numbers and caches one
    np.random.set_state(("MT19937", words[:-1], int(words[-1]), int(has_gauss), cached))
    version, python, gauss = json.loads(state["python"].numpy().tobytes())
    random.setstate((version, tuple(python), gauss))


def _encoded(value: Any) -> Any:
    """Encode a value for JSON without loss: schedulers have dicts with integer keys (MultiStepLR's
    milestones), which JSON would turn into strings.
    """
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _encoded(item) for key, item in value.items()}
        return {"__items__": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__items__"}:
            return {_decoded(key): _decoded(item) for key, item in value["__items__"]}
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
