"""Replay the steps between two checkpoints of a run, and compare the result with the second."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orchestrator.run.local.debug import joined
from orchestrator.run.local.ranks import start_ranks
from orchestrator.run.local.trial import NothingToSave, scratch_run
from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.settings.load import make_spec
from orchestrator.training.assemble import assembled
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.context import RunContext
from orchestrator.training.manifest import listed_in, step_folder, step_of
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.world import is_one_of_many

INTERVAL = "ORCHESTRATOR_INTERVAL"  # environment variable of each rank: an Interval as JSON
SHOWN = 20  # differences


class Interval(NamedTuple):
    """The paths of two checkpoints, and of a temporary run directory for the replay."""

    start: str | None  # None: the start of the run
    end: str
    scratch: str

    @property
    def steps(self) -> str:
        """Return the steps, for a line."""
        first = 1 if self.start is None else step_of(Path(self.start)) + 1
        return f"steps {first} to {step_of(Path(self.end))}"


class Certificate(NamedTuple):
    """The result of a replay."""

    steps: str
    ranks: int
    differences: list[str]  # empty: the replay ended with bitwise the same state
    machines: str  # how they differ, or empty


def certify(run_dir: RunDir, complete: list[Path], command: list[str]) -> Certificate:
    """Replay the steps before the newest of some complete checkpoints of a run, from the one before
    it or from the start, and compare.

    command: starts a rank, which calls `replay_on_this_rank`; for a run of one rank it is not used.

    Raises:
        UserError: the run is running, or the steps cannot be replayed here.
        TrainingError: a step of the replay failed.
    """
    if (owner := run_dir.owner()) is not None:
        rule = f"is running ({owner}), and may delete the checkpoints"
        raise UserError("RUN_DIR", str(run_dir.path), rule, "stop it first, or wait for its end")
    end = complete[0]
    start = complete[1] if len(complete) > 1 else None
    meta = Reader(end).meta
    _check_epochs(meta, 0 if start is None else step_of(start), step_of(end))
    ranks = int(meta["world_size"])
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        interval = Interval(None if start is None else str(start), str(end), scratch)
        if ranks == 1:
            _replay(interval)
        else:
            os.environ[INTERVAL] = json.dumps(interval)
            try:
                code = start_ranks(make_spec(meta["spec"]), ranks, command, keeps_run=False)
            finally:
                del os.environ[INTERVAL]
            if code:
                raise TrainingError(f"the replay of {interval.steps} failed with exit code {code}")
        replayed = step_folder(RunDir(Path(scratch)).checkpoints, step_of(end))
        differences = list(_differences(end, replayed))
        return Certificate(
            interval.steps, ranks, differences, _machines(meta, Reader(replayed).meta)
        )


def replay_on_this_rank() -> bool:
    """Replay the interval of the environment if this process is a rank of `certify`; return whether
    it is.
    """
    text = os.environ.get(INTERVAL)
    if text is None or not is_one_of_many():
        return False
    _replay(Interval(*json.loads(text)))
    return True


def _replay(interval: Interval) -> None:
    """Train from the start of the interval to its end, and save there. Collective.

    The settings are those with which the checkpoint at its end was saved.
    """
    meta = Reader(Path(interval.end)).meta
    spec, step = make_spec(meta["spec"]), int(meta["step"])
    start = None if interval.start is None else Path(interval.start)
    threads = torch.get_num_threads()
    torch.set_num_threads(meta.get("machine", {}).get("threads", threads))
    try:
        with joined(spec, post_mortem=False) as world, scratch_run(spec) as (bare, _):
            context = RunContext(bare, world, NothingToSave(), RunDir(Path(interval.scratch)))
            with assembled(context, prepare(spec), checkpoint=start) as trainer:
                if (cache := trainer.loaders.train.cache) is not None:
                    cache.only_read()  # it belongs to the run
                with closing(trainer.checkpointer), closing(trainer.steps()) as steps:
                    trainer.train(steps, upto=step)
                    trainer.save()
    finally:
        torch.set_num_threads(threads)


def _check_epochs(meta: dict[str, Any], taken: int, last: int) -> None:
    """Check that no callback ended an epoch early in the interval: a replay calls none."""
    if cut := [after for after in meta["epochs_ended"] if taken <= after < last]:
        rule = f"a callback ended an epoch after step {cut[0]}, and a replay calls no callbacks"
        cure = "verify it later, from checkpoints of an epoch that was not cut"
        raise UserError("--replay", True, rule, cure)


def _differences(kept: Path, replayed: Path) -> Iterator[str]:
    """Yield a line for each part of a checkpoint's state that the replay has not reproduced."""
    before, after = Reader(kept), Reader(replayed)
    if _hashes(kept, "rank_") != _hashes(replayed, "rank_"):
        yield from _different_tensors(before, after)
    again = _hashes(replayed, "rng_")
    for name, digest in _hashes(kept, "rng_").items():
        if again.get(name) != digest:
            yield f"the random state of {name.removesuffix('.safetensors')} differs"
    for key, what in {"engine": "schedule or loss scale", "pairs_seen": "position"}.items():
        if before.meta[key] != after.meta[key]:
            yield f"{what}: was {before.meta[key]}, now {after.meta[key]}"


def _machines(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return how the machines of two checkpoints differ, for a line."""
    old, new = before.get("machine", {}), after["machine"]
    changed = [f"{key} {old[key]}, now {new[key]}" for key in old if old[key] != new[key]]
    return f" (it was saved with {', '.join(changed)})" if changed else ""


def _hashes(folder: Path, prefix: str) -> dict[str, str]:
    listed = listed_in(folder)
    assert listed is not None, "a complete checkpoint has a manifest"
    return {name: digest for name, digest in listed.files.items() if name.startswith(prefix)}


def _different_tensors(before: Reader, after: Reader) -> Iterator[str]:
    """Yield a line for each weight or optimizer state that differs; older versions wrote files with
    another order of the same tensors.
    """
    for name in sorted(before.shapes.keys() | after.shapes.keys()):
        for key in sorted(before.keys(name) | after.keys(name)):
            if key not in before.keys(name) & after.keys(name):
                yield f"{name}: {key} is in only one of them"
                continue
            old, new = before.flat(name, key), after.flat(name, key)
            if not torch.equal(old.view(torch.uint8), new.view(torch.uint8)):
                apart = (old.double() - new.double()).abs()
                what = "weight" if key == "param" else key
                yield (
                    f"{name}: {what} differs in {int((apart != 0).sum())} of {len(old)} values, by "
                    f"at most {apart.max().item():.3g}"
                )
