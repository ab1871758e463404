"""Save the parts of a trainer, and restore them when a run resumes."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.data.loader import Loader
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine
from orchestrator.engines.optim import check_resumable, made_by
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.attempts import read_attempts
from orchestrator.training.best import restore_best
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpoint_writer import RankState, Saver
from orchestrator.training.context import RunContext
from orchestrator.training.ledger import Ledger
from orchestrator.training.manifest import step_folder, step_of
from orchestrator.training.ownership import end_if_lost
from orchestrator.training.reporter import Reporter
from orchestrator.training.rng import RngState
from orchestrator.training.run_identity import differences
from orchestrator.training.save_interval import SaveInterval
from orchestrator.training.seen_pairs import SeenPairs
from orchestrator.user_code import source_hash
from orchestrator.world import World

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores engine, position, sums since the last log, callbacks, best step, random
    state and pair ledger of one trainer, and refuses a checkpoint of another run.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        loader: Loader,
        reporter: Reporter,
        identity: dict[str, Any],
    ) -> None:
        self.context, self.engine, self.loader, self.reporter = context, engine, loader, reporter
        self.identity = identity
        # at the start: a file that is edited later is not the code that runs
        self.sources = _sources(context.spec)
        self.seen = SeenPairs(context.spec.dpo) if context.spec.training.pair_ledger else None
        self.ledger = Ledger(context.run_dir.pairs) if context.world.is_main else None
        self.saver = Saver(
            context.run_dir.checkpoints,
            context.world,
            context.spec.checkpoint.keep,
            context.spec.cluster.collective_timeout_s,
            self.ledger,
        )
        self._interval = _interval(context)
        self._resumed_from: Path | None = None
        self._saved = (-1, 0.0)  # step and epoch of the last save

    def resume(self, reader: Reader) -> None:
        """Restore a checkpoint of any engine and world size. Collective.

        The pair ledger follows in `continue_ledger`: a replay resumes too, and must delete no rows.

        Raises:
            UserError: the checkpoint was written with another reference, base, set of trainable
                weights, tokenizer, chat template, optimizer or schedule, or with other training
                pairs, or its optimizer state can only be resumed with the engine and world size
                that wrote it.
            CorruptCheckpoint: a range of a tensor is in no file.
        """
        meta, reporter = reader.meta, self.reporter
        self._check_same_run(meta)
        self.engine.load_shards(reader.read, reader.keys)
        self.engine.set_state(meta["engine"])
        reporter.progress.restore(meta)
        reporter.window.restore(meta["window"])
        reporter.ranges.restore(meta.get("ranges"))
        reporter.callbacks.restore(meta["callbacks"])
        if self._interval is not None:
            self._interval.cost_s = meta.get("save_cost_s")
        restore_best(self.context, reporter.callbacks)
        reporter.show_position()
        self._resumed_from, self._saved = reader.folder, (meta["step"], 0.0)
        reader.restore_rng(self.context.world, self.context.spec.run.seed)

    def continue_ledger(self) -> None:
        """Continue the pair ledger from the position of the run, deleting later rows."""
        if self.ledger is not None:
            self.ledger.go_on(self._resumed_from)

    def add_pairs(
        self, step: int, epoch: int, outputs: Sequence[tuple[PairBatch, StepOutput]]
    ) -> None:
        """Keep the pairs of a step for the ledger, which the next save writes."""
        if self.seen is not None:
            self.seen.add(step, epoch, list(outputs))

    def save(self, rng: RngState | None, in_background: bool) -> None:
        """Save a checkpoint of this step, once. Collective.

        rng: this rank's random state to save; default: the current one. A save in the background is
        committed at the latest when the next save begins or training ends. on_save follows the
        commit, on this thread: at once, or for one in the background on rank 0 before the first
        step after the commit, and on other ranks when the next save begins or training ends.

        Raises:
            SaveFailed: on every rank, for this save or the previous one.
        """
        progress, callbacks = self.reporter.progress, self.reporter.callbacks
        if self._saved[0] == progress.step:
            return
        began = time.monotonic()
        if self.context.world.is_main:
            end_if_lost(self.context.run_dir.lock, self.context.spec.run.name)
        self.wait()
        meta = {
            **progress.to_json(),
            "engine": self.engine.state(),
            "made_by": self._made_by,
            "sources": self.sources,
            "machine": _machine(self.context.world),
            "window": self.reporter.window.per_rank(),
            "ranges": self.reporter.ranges.state(),
            "callbacks": callbacks.exported(),
            "data": self.loader.pairs.identity,  # of the training pairs only
            "identity": self.identity,
            "save_cost_s": self._interval and self._interval.cost_s,
            # a resume compares them (RunDir.check)
            "spec": self.context.spec.model_dump(mode="json"),
        }
        state = RankState(rng, self.seen.take() if self.seen is not None else None)
        best = callbacks.state.best_global_step
        folder = None if best is None else step_folder(self.context.run_dir.checkpoints, best)
        shards = self.engine.iter_shards()
        self.saver.save(progress.step, shards, meta, state, in_background, folder)
        self._saved = progress.step, callbacks.state.epoch
        if self._interval is not None:
            self._interval.saved(time.monotonic() - began)
        self.notify_saved()

    def is_due(self) -> bool:
        """Return whether rank 0 requests a save: the interval of checkpoint.every=auto is over."""
        return (
            self._interval is not None
            and not self.saver.is_writing
            and self.reporter.progress.step > max(0, self._saved[0])
            and self._interval.is_due()
        )

    def wait(self) -> None:
        """Wait for the save in the background, if any. Collective."""
        self.context.session.beat(self.reporter.progress.step, "save")
        self.saver.wait()
        self.notify_saved()

    def notify_saved(self) -> None:
        """Notify callbacks of a newly committed save. They see its step and epoch."""
        if (path := self.saver.pop_committed()) is None:
            return
        if self.context.world.is_main:
            self.context.run_dir.note_save(step_of(path))
        state = self.reporter.callbacks.state
        if state.best_global_step == self._saved[0]:
            state.best_model_checkpoint = str(path)
        present = state.global_step, state.epoch
        state.global_step, state.epoch = self._saved
        self.reporter.callbacks.fire("on_save")
        state.global_step, state.epoch = present

    def close(self) -> None:
        """Join the thread of a save in the background."""
        self.saver.close()

    @property
    def _made_by(self) -> dict[str, Any]:
        """Return the origin of the optimizer state."""
        size = self.context.world.size
        return made_by(self.engine.optimizer, self.engine.scheduler, self.context.spec.engine, size)

    def _check_same_run(self, meta: dict[str, Any]) -> None:
        """Check that the run of a checkpoint had the same models, tokenizer, training pairs and
        optimizer; warn if user code was edited.
        """
        spec, cure = self.context.spec, "restore them to resume it, or choose another run.name"
        if changes := list(differences(meta["identity"], self.identity)):
            rule = "is a run that was started with other models or another tokenizer: "
            raise UserError("run.name", spec.run.name, rule + ", ".join(changes), cure)
        if meta["data"] != self.loader.pairs.identity:
            paths = ", ".join(source.path for source in spec.data.train)
            rule = "its rows or the tokenizer have changed since this run was started"
            raise UserError("data.train", paths, rule, cure)
        check_resumable(meta["made_by"], self._made_by)
        before = meta.get("sources", self.sources)
        for name in self.sources.keys() & before.keys():
            if self.context.world.is_main and self.sources[name] != before[name]:
                message = "%s was edited since this run started: steps after %d use the new code"
                logger.warning(message, name, meta["step"])


def _interval(context: RunContext) -> SaveInterval | None:
    """Return the interval of checkpoint.every=auto on rank 0; None for others."""
    if context.spec.checkpoint.every is None or not context.world.is_main:
        return None
    attempts = read_attempts(context.run_dir.attempts)
    return SaveInterval(context.spec.cluster.mtbf_hours, attempts)


def _machine(world: World) -> dict[str, Any]:
    """Return what the last bits of results depend on, for a replay."""
    is_gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if is_gpu else world.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _sources(spec: RunSpec) -> dict[str, str]:
    """Return a hash of each user file that affects the results, by its module:attr."""
    collator = spec.data.collator.path if spec.data.collator else ""
    names = [*spec.dpo.own_losses, spec.optimizer.name, collator]
    return {name: source_hash(name) for name in names if ":" in name}
