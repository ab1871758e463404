"""Read checkpoints: find the newest complete one, and return any range of its tensors."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.settings.errors import UserError
from orchestrator.training.lossless_json import decode
from orchestrator.training.manifest import ReadFailed, committed, set_aside, verify
from orchestrator.training.rng import seed_everything, set_rng_state
from orchestrator.training.rundir import RunDir
from orchestrator.world import World

logger = logging.getLogger(__name__)


class CorruptCheckpoint(Exception):
    """A checkpoint lacks a part of a tensor."""


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


def choose_checkpoint(run_dir: RunDir, world: World) -> Path | None:
    """Choose the checkpoint to resume from (None: a new run), and disable newer ones that are not
    complete by renaming their manifests. Collective.

    Raises:
        UserError: no checkpoint of the run is complete, or as in `newest_valid`.
    """
    newest, complaints = newest_valid(run_dir.checkpoints, world)
    if complaints and newest is None:
        rule = f"has checkpoints, but none is complete ({complaints[0]})"
        start_over = f"or remove {run_dir.path} to start over"
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
        # the exception itself would keep the frames of run() alive
        mine, failure = ([], (type(error), error.args))
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
        self.meta: dict[str, Any] = decode(json.loads((folder / "meta.json").read_text()))
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
        self.poll: Poll = no_poll  # called for each parameter that is read whole

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

    def flat(self, name: str, key: str) -> torch.Tensor:
        """Return all of a tensor, 1-D on the CPU."""
        return self.read(name, key, 0, max(stop for _, stop, *_ in self._ranges[name, key]))

    def parameter(self, name: str) -> torch.Tensor:
        """Return one whole parameter in its shape."""
        self.poll()
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
