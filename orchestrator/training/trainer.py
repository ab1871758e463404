"""The training loop: take steps, log, evaluate, save and stop."""

import difflib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orchestrator.data.collate import AdaptedCollator, Counts, PairBatch
from orchestrator.data.loader import StepBatches
from orchestrator.data.order import RunLength
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine, StepResult
from orchestrator.engines.optim import check_resumable, made_by
from orchestrator.settings.errors import UserError
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.settings.run import RunSpec
from orchestrator.training import checkpoint
from orchestrator.training.batch_losses import first_pass
from orchestrator.training.callbacks import Callbacks
from orchestrator.training.compute_metrics import UserMetrics
from orchestrator.training.context import RunContext
from orchestrator.training.errors import TrainingError
from orchestrator.training.evaluate import evaluate, over_ranks
from orchestrator.training.ledger import Ledger, SeenPairs
from orchestrator.training.loaders import Loaders
from orchestrator.training.manifest import committed, step_folder
from orchestrator.training.metrics import MetricSums, means
from orchestrator.training.run_identity import differences
from orchestrator.training.start_check import MEASURED, Tolerance, check_start
from orchestrator.user_code import source_hash

# fp16 steps: by then the loss scale is 2**25 times smaller, and the gradient still overflows
MAX_SKIPPED_IN_A_ROW = 25


logger = logging.getLogger(__name__)


class Decisions(NamedTuple):
    """The actions on which all ranks have agreed for this step."""

    non_finite: bool
    save: bool
    evaluate: bool
    log: bool


@dataclass
class FitResult:
    """The result of `fit`."""

    status: str  # finished | stopped
    reason: str
    step: int
    checkpoint: Path
    best_step: int | None  # by evaluation.metric_for_best
    best_metric: float | None


@dataclass
class Trainer:
    """The training loop of one rank, with the parts of the run and its position."""

    context: RunContext
    engine: Engine
    loaders: Loaders
    callbacks: Callbacks
    length: RunLength
    identity: dict[str, Any]  # of the models and the tokenizer; a resumed run must have the same
    user_metrics: UserMetrics | None
    start_tolerance: Tolerance | None  # None: the policy does not start as its reference

    def __post_init__(self) -> None:
        self.spec, self.world = self.context.spec, self.context.world
        self.session, self.run_dir = self.context.session, self.context.run_dir
        self.loader, self.eval_loaders = self.loaders
        self.step = 0  # optimizer steps taken
        self.pairs_seen = 0
        self.tokens_seen = 0.0
        self.losses_seen = (
            0.0,
            0.0,
        )  # sum and count of the logged losses, for their mean at the end
        self.window = MetricSums(self.world)  # since the last log
        self.last: StepResult | None = None
        self.evaluated_at = self.saved_at = -1
        self.saved_epoch = 0.0
        keep, timeout_s = self.spec.checkpoint.keep, self.spec.cluster.collective_timeout_s
        self.seen = SeenPairs(self.spec.dpo) if self.spec.training.pair_ledger else None
        self.ledger = Ledger(self.run_dir.pairs) if self.world.is_main else None
        self.saver = checkpoint.Saver(
            self.run_dir.checkpoints, self.world, keep, timeout_s, self.ledger
        )
        self.resumed_from: Path | None = None
        self.rng: checkpoint.RngState | None = (
            None  # before the current step; a resumed run repeats that step
        )
        self.stopping = False  # requested from outside: save, to be resumed later
        self.finishing = False  # requested by a callback: end training
        self.ending_epoch = False  # requested by a callback: skip the rest of the epoch
        self.epochs_ended: list[int] = []  # the steps after which an epoch ended early
        self.said_unscored = False
        self.sources = _sources(
            self.spec
        )  # at start: a file that is edited later is not the code that runs
        self.in_epoch = False
        self.callbacks.fire("on_init_end")

    # --- position ---------------------------------------------------------------------------------

    def resume(self, reader: checkpoint.Reader) -> None:
        """Resume from a checkpoint of any engine and world size.

        Raises:
            UserError: the checkpoint was written with another reference, base or tokenizer, or with
                other pairs, or its optimizer state can only be resumed with the engine and world
                size that wrote it.
        """
        meta = reader.meta
        if changes := list(differences(meta["identity"], self.identity)):
            raise UserError(
                "run.name",
                self.spec.run.name,
                "is a run that was started with other models or another tokenizer: "
                f"{', '.join(changes)}",
                "restore them to resume it, or choose another run.name",
            )
        if meta["data"] != self.loader.pairs.identity:
            raise UserError(
                "data.train",
                ", ".join(source.path for source in self.spec.data.train),
                "its rows or the tokenizer have changed since this run was started",
                "restore them to resume it, or choose another run.name",
            )
        check_resumable(meta["made_by"], self.made_by)
        before = meta.get("sources", self.sources)
        for name in self.sources.keys() & before.keys():
            if self.world.is_main and self.sources[name] != before[name]:
                message = "%s was edited since this run started: steps after %d use the new code"
                logger.warning(message, name, meta["step"])
        self.engine.load_shards(reader.read, reader.keys)
        self.engine.set_state(meta["engine"])
        self.step, self.pairs_seen, self.tokens_seen = (
            meta["step"],
            meta["pairs_seen"],
            meta["tokens_seen"],
        )
        self.evaluated_at, self.saved_at = meta["evaluated_at"], self.step
        self.losses_seen = (meta["losses_seen"][0], meta["losses_seen"][1])
        # a callback may have ended training, or the epoch, before the process died
        self.finishing, self.ending_epoch = meta["finishing"], meta["ending_epoch"]
        self.epochs_ended = meta["epochs_ended"]
        self.resumed_from = reader.folder
        self.window.restore(meta["window"])
        self.callbacks.restore(meta["callbacks"])
        self._find_best()
        self._update_state()
        reader.restore_rng(self.world, self.spec.run.seed)

    @property
    def made_by(self) -> dict[str, Any]:
        """Return the origin of the optimizer state, for a checkpoint."""
        return made_by(
            self.engine.optimizer, self.engine.scheduler, self.spec.engine, self.world.size
        )

    @property
    def is_over(self) -> bool:
        """Return whether all steps are taken."""
        return self.step >= self.length.steps or (
            self.length.pairs is not None and self.pairs_seen >= self.length.pairs
        )

    @property
    def should_continue(self) -> bool:
        """Return whether to take another step."""
        return not (self.is_over or self.stopping or self.finishing)

    @property
    def _is_between_epochs(self) -> bool:
        return self.pairs_seen % self.loader.order.pairs_per_epoch == 0

    def _update_state(self) -> None:
        state = self.callbacks.state
        state.global_step, state.epoch = (
            self.step,
            self.pairs_seen / self.loader.order.pairs_per_epoch,
        )
        state.num_input_tokens_seen = int(self.tokens_seen)
        state.total_flos = (
            6.0 * self.loader.order.cost.token * self.tokens_seen
        )  # the formula of transformers

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Train from the current position to the end, or until a stop is requested.

        The same on every rank.
        """
        if self.ledger is not None:
            self.ledger.go_on(self.resumed_from)
        self._update_state()
        self.began, self.began_at = time.monotonic(), (self.step, self.pairs_seen)
        self.callbacks.fire("on_train_begin")
        with closing(self.saver):
            if self.step == 0 and self.spec.evaluation.at_start:
                self.evaluate()
            while self.should_continue:
                with closing(self.loader.steps(self.pairs_seen, self.step)) as steps:
                    self.train(steps)
                if self.ending_epoch:
                    self._end_epoch_early()
            return self._end()

    def train(self, steps: Iterator[StepBatches], upto: int | None = None) -> None:
        """Take steps up to `upto` (default: all), or until a stop is requested, or a callback ends
        the epoch.
        """
        callbacks = self.callbacks
        epoch, skipped = -1, 0
        while self.should_continue and not self.ending_epoch and self.step != upto:
            self._notify_saved()
            self.rng = checkpoint.rng_state()
            made = next(steps)
            if made.epoch != epoch:
                epoch, self.in_epoch = made.epoch, True
                callbacks.begin_epoch(resumed=not self._is_between_epochs)
            callbacks.fire("on_step_begin")
            outputs = self.micro_steps(made)

            # requests since the last update are handled now, with its weights: this step has not
            # updated them yet
            asked = self._agree(self.engine.grads_finite())
            if not (self.stopping or self.finishing):
                self._act_on(asked)
            if self.stopping or self.finishing or self.ending_epoch:  # also if requested in _act_on
                self.engine.drop_gradients()
                checkpoint.set_rng_state(self.rng, self.world.device)  # undoes the step
                break

            callbacks.fire("on_pre_optimizer_step")
            self.last = self.engine.optimizer_step(apply=not asked.non_finite)
            self.pairs_seen, self.rng = made.pairs_seen, None
            self.in_epoch = not self._is_between_epochs
            if asked.non_finite:
                skipped += 1
                self._check_skipped(skipped)
            else:
                skipped = 0
                if self.seen is not None:
                    self.seen.add(self.step + 1, made.epoch, outputs)
                self._after_update([output for _, output in outputs])
            if not self.in_epoch:
                self._end_epoch()
            # after the end of an epoch has been handled: a resumed run does not repeat it
            if not asked.non_finite and self._due.save and not self.is_over:
                self.save()

    def _after_update(self, outputs: list[StepOutput]) -> None:
        """Count the step, and log and evaluate if due."""
        self.callbacks.fire("on_optimizer_step")
        self.step += 1
        if self.spec.reference.sync_every and self.step % self.spec.reference.sync_every == 0:
            self.engine.sync_reference(self.spec.reference.sync_alpha)
        for output in outputs:
            self.window.add(output.metric_sums)
        self._update_state()
        self.session.heartbeat(self.step, "train")
        due = self._due
        self.callbacks.end_step(
            log=due.log, evaluate=due.evaluate, save=due.save, stop=self.is_over
        )
        if due.log:
            self.log()
        if due.evaluate:
            self.evaluate()

    @property
    def _due(self) -> Decisions:
        """Return what is due after the current step by the settings."""
        evaluation, over = self.spec.evaluation, self.is_over
        by_epoch = (
            evaluation.every_epoch and evaluation.every_steps is None
        )  # evaluated after the end of the epoch
        evaluate = self._is_at(evaluation.every_steps) or (over and not by_epoch)
        return Decisions(
            non_finite=False,
            save=self._is_at(self.spec.checkpoint.every_steps) or over,
            evaluate=bool(self.eval_loaders) and evaluate,
            log=self._is_at(self.spec.training.logging_steps) or over,
        )

    def _is_at(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _end_epoch(self) -> None:
        self.in_epoch = False
        self.callbacks.fire("on_epoch_end")
        if self.spec.evaluation.every_epoch:
            self.evaluate()

    def _end_epoch_early(self) -> None:
        """Skip to the next epoch, if the run has one, as a callback requested."""
        self._end_epoch()
        per_epoch = self.loader.order.pairs_per_epoch
        over = self.pairs_seen // per_epoch + 1
        # only now: a checkpoint saved at the end of the epoch belongs to that epoch
        self.pairs_seen, self.ending_epoch = over * per_epoch, False
        self.epochs_ended.append(self.step)
        self.finishing |= over >= self.callbacks.state.num_train_epochs

    def _end(self) -> FitResult:
        """Evaluate (unless the run was stopped, to be resumed) and save."""
        stopped = self.stopping and not self.finishing and not self.is_over
        if not stopped:
            self.log()  # the rest of the window if a callback ended the run
            if self.in_epoch:
                self._end_epoch()
            self.evaluate()
        self._finish_save()
        self.save(last=True)
        if not stopped:
            self._report_totals()
        self.callbacks.fire("on_train_end")
        folder, state = step_folder(self.run_dir.checkpoints, self.step), self.callbacks.state
        status, reason = (
            "finished",
            "every step was taken" if self.is_over else "requested by a callback",
        )
        if stopped:
            status, reason = "stopped", self.session.stop_requested() or "requested on another rank"
        return FitResult(
            status, reason, self.step, folder, state.best_global_step, state.best_metric
        )

    def micro_steps(self, made: StepBatches) -> list[tuple[PairBatch, StepOutput]]:
        """Run forward and backward for this rank's micro-batches, and return each (on the host)
        with its output. The engine then holds the gradient.
        """
        counts = over_ranks(self.world, made.counts) if made.are_local else made.counts
        self._warn_if_unscored(counts)
        if self.engine.forward_is_collective:
            made = self._sync_reference_cache_misses(made)
        dpo, ready = self.spec.dpo, made.micro_batches
        if dpo.needs_whole_batch:
            ready = first_pass(self.engine, made.micro_batches, counts, dpo, self.world)
        outputs: list[tuple[PairBatch, StepOutput]] = []
        last = len(made.micro_batches) - 1
        for i, batch in enumerate(made.micro_batches):
            output = self.engine.micro_step(ready[i].to(self.world.device), counts, last=i == last)
            outputs.append((batch, output))
            if i < last:
                self.callbacks.fire("on_substep_end")
        for (
            batch,
            output,
        ) in outputs:  # before the next collective: all ranks find it in the next epoch
            self.loader.remember(batch, output.ref_logps)
        if self.step == 0 and self.start_tolerance is not None:
            self._check_start(outputs, self.start_tolerance)
        return outputs

    def _warn_if_unscored(self, counts: Counts) -> None:
        """Warn once if a step has no scored token of a chosen completion."""
        if counts.chosen_tokens or self.said_unscored or not self.world.is_main:
            return
        self.said_unscored = True
        logger.warning(
            "step %d: no token of a chosen completion is scored; raise data.max_length, or check "
            "the completion_mask of data.collator",
            self.step + 1,
        )

    def _sync_reference_cache_misses(self, made: StepBatches) -> StepBatches:
        """Drop the cached log-probs if one rank lacks its own: a sharding engine gathers weights on
        all ranks.
        """
        known = all(batch.ref_logps is not None for batch in made.micro_batches)
        if self.world.all(known) or self.loader.cache is None:
            return made
        return made._replace(
            micro_batches=[batch._replace(ref_logps=None) for batch in made.micro_batches]
        )

    def _check_start(self, outputs: list[tuple[PairBatch, StepOutput]], near: Tolerance) -> None:
        """Check that the policy equals its reference before the first update."""
        # log-probs in a batch of a user's collator may be the user's
        by_user = isinstance(self.loader.collator, AdaptedCollator)
        compared = [
            (batch, output)
            for batch, output in outputs
            if batch.pair_weights.any() and not (by_user and batch.ref_logps is not None)
        ]
        check_start(self.context, compared[:MEASURED], near)

    # --- agreement --------------------------------------------------------------------------------

    def _agree(self, finite: torch.Tensor | None = None) -> Decisions:
        """Combine the requests of all ranks in one small reduction, so that all act on them at the
        same step.
        """
        stop = int(self.session.stop_requested() is not None)
        flags = torch.tensor(
            [0, stop, *self.callbacks.take_requests()], dtype=torch.int32, device=self.world.device
        )
        if finite is not None:
            flags[0] = ~finite
        non_finite, stop, finish, end_epoch, save, evaluate, log = map(
            bool, self.world.max(flags).tolist()
        )
        self.stopping |= stop
        self.finishing |= finish
        self.ending_epoch |= end_epoch and self.in_epoch
        return Decisions(non_finite, save, evaluate, log)

    def _act_on(self, asked: Decisions) -> None:
        if asked.log:
            self.log()
        if asked.evaluate:
            self.evaluate()
        if asked.save:
            self.save()

    def _check_skipped(self, in_a_row: int) -> None:
        """Check that training can continue after a non-finite gradient: only in fp16, which lowers
        its loss scale, and for a limited number of steps.
        """
        traits = PRECISION_TRAITS[self.context.precision]
        if traits.scales_loss and in_a_row <= MAX_SKIPPED_IN_A_ROW:
            return
        other = " or precision=fp32" if traits.is_16_bit else ""
        other += "".join(f", or fix {name}" for name in self.spec.dpo.own_losses)
        raise TrainingError(
            f"step {self.step + 1} (rank {self.world.rank}): the gradient is not finite after "
            f"pair {self.pairs_seen}; choose another run.name with a lower optimizer.lr{other}"
        )

    # --- between steps ----------------------------------------------------------------------------

    def log(self) -> None:
        """Report the metrics since the last log; one reduction."""
        totals = self.window.totals()
        if not totals[0][1]:
            return  # no step since the last log
        logs = means(totals)
        self.losses_seen = (self.losses_seen[0] + totals[0][0], self.losses_seen[1] + totals[0][1])
        self.tokens_seen += logs["num_tokens"]
        logs["num_tokens"] = self.tokens_seen
        if self.last is not None:
            logs |= {"grad_norm": float(self.last.grad_norm), "learning_rate": self.last.lr}
        self.window.clear()
        self._update_state()
        self._report(logs)

    def evaluate(self) -> None:
        """Evaluate, at most once per step, and save the best. Handle requests of callbacks (early
        stopping, a save) at once.
        """
        if not self.eval_loaders or self.evaluated_at == self.step:
            return
        self.evaluated_at = self.step
        self.session.heartbeat(self.step, "evaluate")
        by_token = any(traits.is_token_mean for traits in self.spec.dpo.traits)
        found: dict[str, float] = {}
        for name, loader in self.eval_loaders.items():
            after = self._after_evaluated_batch
            metrics = evaluate(
                self.engine, loader, self.world, self.step, after, by_token, name, self.user_metrics
            )
            if twice := found.keys() & metrics.keys():
                rule = f"two evaluation sets have a metric {min(twice)}"
                raise UserError("data.eval", name, rule, "rename that set")
            self.callbacks.fire("on_evaluate", metrics=self._report(metrics))
            found |= metrics
        self._remember_best(found)  # after on_evaluate, which compares with the previous best
        self._act_on(self._agree()._replace(evaluate=False))

    def _after_evaluated_batch(self) -> None:
        self.session.heartbeat(self.step, "evaluate")
        self.callbacks.fire("on_prediction_step")

    def save(self, last: bool = False) -> None:
        """Save a checkpoint of this step, once; with checkpoint.async_save in the background,
        unless it is the last.

        A save in the background is committed at the latest when the next save begins or training
        ends. on_save follows the commit, on this thread: at once, or with
        checkpoint.async_save on rank 0 before the first step after the commit, and on other ranks
        when the next save begins or training ends.

        Raises:
            SaveFailed: on every rank, for this save or the previous one.
        """
        if self.saved_at == self.step:
            return
        self.session.heartbeat(self.step, "save")
        self._finish_save()
        window = self.window.per_rank()
        meta = {
            "engine": self.engine.state(),
            "made_by": self.made_by,
            "sources": self.sources,
            "pairs_seen": self.pairs_seen,
            "tokens_seen": self.tokens_seen,
            "evaluated_at": self.evaluated_at,
            "losses_seen": self.losses_seen,
            "finishing": self.finishing,
            "ending_epoch": self.ending_epoch,
            "epochs_ended": self.epochs_ended,
            "window": window,
            "callbacks": self.callbacks.exported(),
            "data": self.loader.pairs.identity,
            "identity": self.identity,
            "spec": self.spec.model_dump(mode="json"),
        }
        seen = self.seen.take() if self.seen is not None else None
        in_background = self.spec.checkpoint.async_save and not last
        best = self.callbacks.state.best_global_step
        folder = None if best is None else step_folder(self.run_dir.checkpoints, best)
        self.saver.save(
            self.step, self.engine.iter_shards(), meta, self.rng, in_background, folder, seen
        )
        self.saved_at, self.saved_epoch = self.step, self.callbacks.state.epoch
        self._notify_saved()

    def _finish_save(self) -> None:
        """Wait for the save in the background, if any."""
        self.saver.wait()
        self._notify_saved()

    def _notify_saved(self) -> None:
        """Notify session and callbacks of a newly committed save.

        Callbacks see its step and epoch.
        """
        if (path := self.saver.pop_committed()) is None:
            return
        state = self.callbacks.state
        if state.best_global_step == self.saved_at:
            state.best_model_checkpoint = str(path)
        present = state.global_step, state.epoch
        state.global_step, state.epoch = self.saved_at, self.saved_epoch
        self.callbacks.fire("on_save")
        state.global_step, state.epoch = present

    def _report_totals(self) -> None:
        """Report transformers' totals at the end: the time of this process and the mean loss of the
        run.
        """
        seconds, (step, pairs) = max(time.monotonic() - self.began, 1e-9), self.began_at
        loss, count = self.losses_seen
        self._report(
            {
                "train_runtime": seconds,
                "train_samples_per_second": (self.pairs_seen - pairs) / seconds,
                "train_steps_per_second": (self.step - step) / seconds,
                "total_flos": self.callbacks.state.total_flos,
                "train_loss": loss / (count or 1.0),
            }
        )

    def _report(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Pass the logs and the epoch to the callbacks, and return them."""
        logs = {**logs, "epoch": self.pairs_seen / self.loader.order.pairs_per_epoch}
        if self.world.is_main:
            self.callbacks.state.log_history.append({**logs, "step": self.step})
        self.callbacks.fire("on_log", logs=logs)
        return logs

    def _remember_best(self, metrics: dict[str, float]) -> None:
        """Request a save if the weights of this step are the best so far; never for step 0, as in
        transformers.

        Raises:
            UserError: the evaluation has no metric of the name in evaluation.metric_for_best.
        """
        name, state = self.spec.evaluation.best_metric, self.callbacks.state
        if name is None:
            return
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, n=1) or list(metrics)
            cure = f"did you mean {near[0].removeprefix('eval_')}?"
            raise UserError(
                "evaluation.metric_for_best", name, "is not among the evaluated metrics", cure
            )
        sign = 1 if self.spec.greater_is_better else -1
        best = -math.inf if state.best_metric is None else sign * state.best_metric
        if self.step and sign * metrics[name] > best:  # False for NaN
            state.best_metric, state.best_global_step = metrics[name], self.step
            self.callbacks.control.should_save = True

    def _find_best(self) -> None:
        """Find the checkpoint that was the best before; if it is gone, the next evaluation becomes
        the best.
        """
        state = self.callbacks.state
        if state.best_global_step is None or self.spec.evaluation.metric_for_best is None:
            return
        folder = step_folder(self.run_dir.checkpoints, state.best_global_step)
        if folder in committed(self.run_dir.checkpoints):
            state.best_model_checkpoint = str(folder)
            return
        if self.world.is_main:
            logger.warning(
                "the best checkpoint %s is missing; the next evaluation becomes the best", folder
            )
        state.best_metric = state.best_global_step = None


def _sources(spec: RunSpec) -> dict[str, str]:
    """Return a hash of each user file that affects the results, by its module:attr."""
    named = [
        *spec.dpo.own_losses,
        spec.optimizer.name,
        spec.data.collator.path if spec.data.collator else "",
    ]
    return {name: source_hash(name) for name in named if ":" in name}
