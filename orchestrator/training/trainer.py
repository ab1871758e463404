"""The training loop: take steps, log, evaluate, save and stop."""

import logging
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.data.loader import StepBatches
from orchestrator.data.order import RunLength
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine
from orchestrator.settings.errors import StopRequested
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.training.batch_losses import first_pass
from orchestrator.training.best import restore_best, save_if_best
from orchestrator.training.callbacks.handler import REQUESTS, Callbacks
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpointer import Checkpointer
from orchestrator.training.compute_metrics import UserMetrics
from orchestrator.training.context import RunContext
from orchestrator.training.decisions import Agreement, Decisions, StepNumbers, agree, due_after
from orchestrator.training.evaluate import evaluate_sets, over_ranks
from orchestrator.training.heartbeat import Phase
from orchestrator.training.loaders import Loaders
from orchestrator.training.manifest import step_folder
from orchestrator.training.non_finite import NonFinite
from orchestrator.training.progress import Progress
from orchestrator.training.reference_cache import cached_on_all_ranks
from orchestrator.training.reporter import Reporter
from orchestrator.training.result import FitResult
from orchestrator.training.rng import RngState, rng_state, set_rng_state
from orchestrator.training.start_check import Tolerance, check_start

# fp16 steps: by then the loss scale is 2**25 times smaller, and the gradient still overflows
MAX_SKIPPED_IN_A_ROW = 25
# batches without an update that training.on_non_finite=skip allows
MAX_NON_FINITE_IN_A_ROW = 10

Outputs = list[tuple[PairBatch, StepOutput]]
"""The micro-batches of a step on this rank, on the host, with their outputs."""

logger = logging.getLogger(__name__)


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
        context, loader = self.context, self.loaders.train
        self.progress = Progress()
        self.reporter = Reporter(self.progress, self.callbacks, loader.order, context.world)
        self.checkpointer = Checkpointer(context, self.engine, loader, self.reporter, self.identity)
        self.suspending = False  # requested from outside: save, to be resumed later
        self._epoch = -1  # that of the last batches
        self._in_epoch = False  # between on_epoch_begin and on_epoch_end
        self._last_batch: PairBatch | None = None
        self._rng: RngState | None = None  # before a step that is not updated yet
        self.non_finite = NonFinite(context, self.engine, loader.pairs, self.checkpointer.wait)
        self._has_warned_unscored = False
        # not with self: a circle would keep the weights until the next collection
        progress = self.progress
        self.engine.after_forward = lambda: context.session.beat(progress.step, "backward")
        self.callbacks.fire("on_init_end")

    def resume(self, reader: Reader) -> None:
        """Resume from a checkpoint of any engine and world size.

        Raises:
            UserError: as `Checkpointer.resume`.
        """
        self.checkpointer.resume(reader)

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> FitResult:
        """Train from the current position to the end, or until a stop is requested. The same on
        every rank.
        """
        self.checkpointer.continue_ledger()
        self.reporter.begin()
        self.callbacks.fire("on_train_begin")
        with closing(self.checkpointer):
            self._evaluate_first()
            while self.should_continue:
                with closing(self.steps()) as steps:
                    self.train(steps)
                if self.progress.ending_epoch:
                    self._skip_to_next_epoch()
            return self._finish()

    def train(self, steps: Iterator[StepBatches], upto: int | None = None) -> None:
        """Take steps up to `upto` (default: all), or until a stop is requested, or a callback ends
        the epoch.
        """
        progress = self.progress
        while self.should_continue and not progress.ending_epoch and progress.step != upto:
            batches = self._next_batches(steps)
            outputs = self.forward_backward(batches)

            # requests since the last update are handled now, with its weights: this step has not
            # updated them yet
            decisions, loss, grad_norm = self._agree(self._numbers(outputs))
            if not (self.suspending or progress.finishing):
                self._act_on(decisions)
            if self.suspending or progress.finishing or progress.ending_epoch:
                self._undo_forward_backward()
                break

            self._update(batches, apply=not decisions.non_finite)
            if decisions.non_finite:
                due = self._count_skipped_or_fail(outputs, loss)
            else:
                values = self.reporter.ranges.add(self.progress.step + 1, loss, grad_norm)
                self.non_finite.remark(self.progress.step + 1, values)
                due = self._count_step(batches, outputs)
            if due.log:
                self.log()
            if due.evaluate:
                self.evaluate()
            if self._is_between_epochs:
                self._end_epoch()
            # after the end of the epoch, which a resumed run does not repeat
            if due.save and not self.is_over:
                self.save()

    @property
    def should_continue(self) -> bool:
        """Return whether to take another step."""
        return not (self.is_over or self.suspending or self.progress.finishing)

    @property
    def is_over(self) -> bool:
        """Return whether all steps are taken, or all pairs seen: fp16 may have skipped steps."""
        pairs = self.length.pairs
        if pairs is not None and self.progress.pairs_seen >= pairs:
            return True
        return self.progress.step >= self.length.steps

    def steps(self) -> Generator[StepBatches]:
        """Yield the micro-batches of every step from the current position, endlessly; the caller
        closes it.
        """
        return self.loaders.train.steps(self.progress.pairs_seen, self.progress.step)

    # --- a step -----------------------------------------------------------------------------------

    def _next_batches(self, steps: Iterator[StepBatches]) -> StepBatches:
        """Return the micro-batches of the next step, of which callbacks are notified."""
        self.checkpointer.notify_saved()
        self._rng = rng_state()
        self._beat("collate")
        batches = next(steps)
        if batches.epoch != self._epoch:
            self._epoch, self._in_epoch = batches.epoch, True
            self.callbacks.begin_epoch(resumed=not self._is_between_epochs)
        self.callbacks.fire("on_step_begin")
        return batches

    def forward_backward(self, batches: StepBatches) -> Outputs:
        """Run forward and backward for this rank's micro-batches, and return each with its output.
        The engine then holds the gradient.
        """
        spec, world, loader = self.context.spec, self.context.world, self.loaders.train
        self._beat("reduce")
        counts = over_ranks(world, batches.counts) if batches.are_local else batches.counts
        self._warn_if_unscored(counts)
        micro_batches = batches.micro_batches
        if self.engine.forward_is_collective:
            micro_batches = cached_on_all_ranks(world, loader, micro_batches)
        ready = micro_batches
        if spec.dpo.needs_whole_batch:
            ready = first_pass(self.engine, micro_batches, counts, spec.dpo, world)
        outputs: Outputs = []
        last = len(micro_batches) - 1
        for i, batch in enumerate(micro_batches):
            self._beat("forward", i + 1, batch.pair_ids)
            output = self.engine.micro_step(ready[i].to(world.device), counts, last=i == last)
            outputs.append((batch, output))
            if i < last:
                self.callbacks.fire("on_substep_end")
        # before the next collective: all ranks find them in the next epoch
        for batch, output in outputs:
            loader.remember(batch, output.ref_logps)
        if self.progress.step == 0 and self.start_tolerance is not None:
            by_user = isinstance(loader.collator, AdaptedCollator)
            check_start(self.context, outputs, self.start_tolerance, by_user)
        return outputs

    def _beat(self, phase: Phase, micro_batch: int = 0, pairs: torch.Tensor | None = None) -> None:
        """Report the place of this rank to its launcher."""
        self.context.session.beat(self.progress.step, phase, micro_batch, pairs)

    def _warn_if_unscored(self, counts: Counts) -> None:
        """Warn once if a step has no scored token of a chosen completion."""
        if counts.chosen_tokens or self._has_warned_unscored or not self.context.world.is_main:
            return
        self._has_warned_unscored = True
        logger.warning(
            "step %d: no token of a chosen completion is scored; raise data.max_length, or check "
            "the completion_mask of data.collator",
            self.progress.step + 1,
        )

    def _undo_forward_backward(self) -> None:
        """Drop the step that was not updated: a resumed run repeats it."""
        self.engine.drop_gradients()
        assert self._rng is not None
        set_rng_state(self._rng, self.context.world.device)

    def _update(self, batches: StepBatches, apply: bool) -> None:
        """Update the weights, unless the gradient is not finite, and advance in the data."""
        self._beat("update")
        self.callbacks.fire("on_pre_optimizer_step")
        self.reporter.last_update = self.engine.optimizer_step(apply)
        self.progress.pairs_seen, self._rng = batches.pairs_seen, None
        self._in_epoch = not self._is_between_epochs

    def _numbers(self, outputs: Outputs) -> StepNumbers:
        """Return the numbers of a step whose gradient the engine holds."""
        loss = torch.stack([output.loss for _, output in outputs]).sum()
        finite = self.engine.grads_finite()
        return StepNumbers(finite, loss, self.engine.grad_norm)

    def _count_skipped_or_fail(self, outputs: Outputs, loss: float) -> Decisions:
        """Count a step without update; nothing is due after it.

        Raises:
            TrainingError: training cannot continue: only fp16 and training.on_non_finite=skip allow
                such steps, and only a limited number of them in a row.
        """
        step, progress = self.progress.step + 1, self.progress
        progress.skipped_in_a_row += 1
        is_scaled = PRECISION_TRAITS[self.context.precision].scales_loss
        skips = self.context.spec.training.on_non_finite == "skip"
        limit = MAX_NON_FINITE_IN_A_ROW if skips else 0
        limit = MAX_SKIPPED_IN_A_ROW if is_scaled else limit
        is_within = progress.skipped_in_a_row <= limit
        if is_within and is_scaled and math.isfinite(loss):  # its scale is too large
            return Decisions()
        broken, show = self.non_finite.weights(), self.non_finite.how_to_see(step)
        cause = broken or self.non_finite.cause(outputs, loss)
        if is_within and not broken:
            line = "; ".join([f"step {step}: {cause}", "skipped without an update", *show])
            if self.context.world.is_main:
                logger.warning("%s", line)
            return Decisions()
        if progress.skipped_in_a_row > 1:
            cause += f", after {progress.skipped_in_a_row - 1} skipped in a row"
        skip = [] if skips or broken else ["resume with training.on_non_finite=skip"]
        raise self.non_finite.error(step, cause, *show, *skip)

    def _count_step(self, batches: StepBatches, outputs: Outputs) -> Decisions:
        """Count an update, and return what is due after it."""
        self.progress.skipped_in_a_row, self._last_batch = 0, outputs[0][0]
        spec, progress = self.context.spec, self.progress
        self.checkpointer.add_pairs(progress.step + 1, batches.epoch, outputs)
        self.callbacks.fire("on_optimizer_step")
        progress.step += 1
        if spec.reference.sync_every and progress.step % spec.reference.sync_every == 0:
            self.engine.sync_reference(spec.reference.sync_alpha)
        self.reporter.add([output for _, output in outputs])
        self.reporter.show_position()
        self._beat("callbacks")
        due = due_after(spec, progress.step, self.is_over)
        due = due._replace(evaluate=due.evaluate and bool(self.loaders.eval))
        self.callbacks.end_step(
            log=due.log, evaluate=due.evaluate, save=due.save, is_last=self.is_over
        )
        return due

    # --- requests ---------------------------------------------------------------------------------

    def _agree(self, numbers: StepNumbers | None = None) -> Agreement:
        """Agree with the other ranks on what to do; one small reduction."""
        self._beat("reduce")
        requests = self.callbacks.take_requests()
        requests[REQUESTS.index("should_save")] |= self.checkpointer.is_due()
        agreement = agree(self.context, requests, numbers)
        decisions = agreement.decisions
        self.suspending |= decisions.suspend
        self.progress.finishing |= decisions.finish
        self.progress.ending_epoch |= decisions.end_epoch and self._in_epoch
        return agreement

    def _act_on(self, decisions: Decisions) -> None:
        if decisions.log:
            self.log()
        if decisions.evaluate:
            self.evaluate()
        if decisions.save:
            self.save()

    # --- between steps ----------------------------------------------------------------------------

    def log(self) -> None:
        """Report the metrics since the last log."""
        self.reporter.log()

    def _evaluate_first(self) -> None:
        """Evaluate before the first step, if the settings say so, or go on with an evaluation that
        a stop has interrupted.
        """
        progress, is_interrupted = self.progress, self.progress.evaluating is not None
        if is_interrupted or (progress.step == 0 and self.context.spec.evaluation.at_start):
            self.evaluate()
        if is_interrupted:
            restore_best(self.context, self.callbacks)  # it was saved before it was the best

    def evaluate(self) -> None:
        """Evaluate, at most once per step, and save the best. Handle requests of callbacks (early
        stopping, a save) at once. A stop interrupts it: a resumed run goes on with it.
        """
        progress, step = self.progress, self.progress.step
        if not self.loaders.eval or progress.evaluated_at == step:
            progress.evaluating = None
            return
        progress.evaluating = progress.evaluating or {}
        if self.suspending:
            return
        try:
            metrics = evaluate_sets(
                self.context, self.engine, self.loaders.eval, self.reporter, self.user_metrics
            )
        except StopRequested:
            self.suspending = True
            return
        progress.evaluated_at = step
        losses = {
            name: metrics[f"eval_{name}_loss" if name else "eval_loss"]
            for name in self.loaders.eval
        }
        progress.broken_sets = self.non_finite.remark_on_sets(step, losses, self.reporter.ranges)
        # after on_evaluate, which compares with the previous best
        save_if_best(self.context, self.callbacks, step, metrics)
        self._act_on(self._agree().decisions._replace(evaluate=False))

    def save(self) -> None:
        """Save a checkpoint, in the background with checkpoint.async_save; not with weights that
        are not finite, which would replace the last good one.

        Raises:
            TrainingError: they are not.
        """
        self._beat("save")
        self.non_finite.check_weights(self.progress.step)
        self.checkpointer.save(self._rng, self.context.spec.checkpoint.async_save)

    # --- the end of an epoch and of the run -------------------------------------------------------

    @property
    def _is_between_epochs(self) -> bool:
        return self.progress.pairs_seen % self.loaders.train.order.pairs_per_epoch == 0

    def _end_epoch(self) -> None:
        self._in_epoch = False
        self.callbacks.fire("on_epoch_end")
        if self.context.spec.evaluation.every_epoch:
            self.evaluate()

    def _skip_to_next_epoch(self) -> None:
        """End the epoch early, as a callback requested, and the run if it has no other epoch."""
        self._end_epoch()
        progress, per_epoch = self.progress, self.loaders.train.order.pairs_per_epoch
        over = progress.pairs_seen // per_epoch + 1
        # only now: a checkpoint saved at the end of the epoch belongs to that epoch
        progress.pairs_seen, progress.ending_epoch = over * per_epoch, False
        progress.epochs_ended.append(progress.step)
        progress.finishing |= over >= self.callbacks.state.num_train_epochs

    def _finish(self) -> FitResult:
        """Evaluate (unless the run was stopped, to be resumed) and save."""
        is_suspended = self.suspending and not self.progress.finishing and not self.is_over
        self._beat("save")
        self.non_finite.check_weights(self.progress.step)
        if not is_suspended:
            self.log()  # the rest of the window if a callback ended the run
            if self._in_epoch:
                self._end_epoch()
            self.evaluate()
        is_suspended |= self.progress.evaluating is not None
        if not is_suspended:
            self.non_finite.check_end(self.progress, bool(self.loaders.eval), self._last_batch)
        self.checkpointer.wait()
        self.checkpointer.save(self._rng, in_background=False)
        if not is_suspended:
            self.reporter.report_totals()
        self.callbacks.fire("on_train_end")
        status, reason = "finished", self._why_finished
        if is_suspended:
            reason = self.context.session.stop_requested() or "requested on another rank"
            reason += ", during the evaluation" * (self.progress.evaluating is not None)
            status = "stopped"
        step, state = self.progress.step, self.callbacks.state
        folder = step_folder(self.context.run_dir.checkpoints, step)
        return FitResult(status, reason, step, folder, state.best_global_step, state.best_metric)

    @property
    def _why_finished(self) -> str:
        if self.progress.step >= self.length.steps:
            return "every step was taken"
        if not self.progress.finishing:
            return "every pair was seen, in fewer steps than planned"
        if self.context.spec.evaluation.early_stopping:
            return "requested by a callback or evaluation.early_stopping"
        return "requested by a callback"
