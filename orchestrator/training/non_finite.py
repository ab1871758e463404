"""Name what is not finite: the ranks and pairs of a step, or weights, and the last good checkpoint
of the run.
"""

import logging
import math
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.data.pairs import Pairs
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine
from orchestrator.settings.errors import TrainingError
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.training.checkpoint_writer import SaveFailed
from orchestrator.training.context import RunContext
from orchestrator.training.manifest import committed
from orchestrator.training.progress import Progress
from orchestrator.training.running_range import RunningRanges

SHOWN = 8  # pairs or weights that a line names
CAUSES = ("reference log-probs", "log-probs", "loss")
"""Numbers of a pair, in the order in which one that is not finite spreads to the next."""


logger = logging.getLogger(__name__)


class Suspects(NamedTuple):
    """The pairs of a rank in a step, and those whose numbers are not finite."""

    pair_ids: list[int]
    # by a name of CAUSES: pair id -> nan or inf
    bad: dict[str, dict[int, float]]


class NonFinite:
    """Lines about numbers that are not finite. Every method is collective unless it says otherwise,
    and returns the same on all ranks.
    """

    def __init__(
        self, context: RunContext, engine: Engine, pairs: Pairs, wait: Callable[[], None]
    ) -> None:
        """Initialise. pairs: those of training. wait: waits for a save in the background."""
        self.context, self.engine, self.pairs, self.wait = context, engine, pairs, wait

    def cause(self, outputs: Sequence[tuple[PairBatch, StepOutput]], loss: float) -> str:
        """Return what is not finite in a step: the loss of which rank and pairs, the gradient, or
        both.

        outputs: the micro-batches of this rank, on the host, with their outputs. loss: of the step.
        """
        ranks = self.context.world.gather(_suspects(outputs))
        for name in CAUSES:
            if lines := [
                f"rank {rank}: {name} {_values(of_rank.bad[name])} for "
                f"{self._named(sorted(of_rank.bad[name]))}"
                for rank, of_rank in enumerate(ranks)
                if of_rank.bad[name]
            ]:
                also = "" if self.engine.grad_norm.isfinite() else "the gradient is not finite: "
                more = f" and {len(lines) - SHOWN} more ranks" if len(lines) > SHOWN else ""
                return also + "; ".join(lines[:SHOWN]) + more
        pair_ids = sorted({pair_id for of_rank in ranks for pair_id in of_rank.pair_ids})
        return f"the gradient is not finite, the loss is ({loss:.4g}), for {self._named(pair_ids)}"

    def weights(self) -> str:
        """Return which weights are not finite; empty if all are."""
        ranks = self.context.world.gather(self.engine.non_finite_weights())
        names = sorted({name for names in ranks for name in names})
        return f"the weights {_listed(names)} are not finite" if names else ""

    def error(self, step: int, what: str, *fixes: str) -> TrainingError:
        """Return the error of a run that cannot continue, which names its last good checkpoint:
        only one with finite weights is saved.

        what: what is not finite. fixes: how to continue this run, which a trial cannot.
        """
        with suppress(SaveFailed):
            self.wait()
        parts, cures = [f"step {step}: {what}"], [self._other_settings()]
        if self._is_kept:
            parts, cures = [*parts, self._last_good()], [*fixes, *cures]
        line = "; ".join([*parts, ", or ".join(cures)])
        return TrainingError(self.context.world.gather(line)[0])

    def how_to_see(self, step: int) -> list[str]:
        """Return how to see the pairs of a step; nothing in a trial. Not collective."""
        command = f"orchestrator debug {self._folder} --replay-step={step}"
        return [f"see its pairs with {command}"] if self._is_kept else []

    def check_weights(self, step: int) -> None:
        """Check that the weights after a step are finite.

        Raises:
            TrainingError: they are not.
        """
        if broken := self.weights():
            raise self.error(step, broken)

    def check_end(
        self, progress: Progress, is_evaluated: bool, last_batch: PairBatch | None
    ) -> None:
        """Check that the numbers of the final weights are finite: those of the last evaluation, or
        without one the log-probs of a micro-batch.

        last_batch: of the last step, on the host; None if this process took none.

        Raises:
            TrainingError: they are not, or no batch could be used for an update.
        """
        step = progress.step
        if progress.skipped_in_a_row and not step:
            raise self.error(0, "no batch had a finite loss and gradient")
        if progress.broken_sets:
            of_sets = " and ".join(map(_set_name, progress.broken_sets))
            raise self.error(step, f"the loss of {of_sets} is not finite, so no model is exported")
        if is_evaluated or last_batch is None:
            return
        known = torch.zeros(2 * len(last_batch.pair_ids), dtype=torch.float64)
        batch = last_batch._replace(ref_logps=known).to(self.context.world.device)
        logps = self.engine.evaluate(batch, Counts(1, 1)).logps
        if not self.context.world.all(bool(logps.isfinite().all())):
            what = "the log-probs of the final weights are not finite, so no model is exported"
            raise self.error(step, what)

    def remark(self, step: int, values: str | None) -> None:
        """Print the numbers of a step that are far outside their range. Not collective."""
        if values is None or not self.context.world.is_main:
            return
        lr = f"if it stays so, optimizer.lr (now {self.context.spec.optimizer.lr:g}) is too high"
        logger.warning("%s", "; ".join([f"step {step}: {values}", lr, *self.how_to_see(step)]))

    def remark_on_sets(
        self, step: int, losses: dict[str, float], ranges: RunningRanges
    ) -> list[str]:
        """Print the losses of evaluation sets that are far outside the range of training, and
        return the sets whose loss is not finite. Not collective.
        """
        training = ranges.ranges["loss"]
        for name, loss in losses.items():
            if self.context.world.is_main and (
                not math.isfinite(loss) or training.is_outside(loss)
            ):
                what = f"the loss of {_set_name(name)} is {loss:.4g}"
                logger.warning("step %d: %s, in training %.4g", step, what, training.median)
        return [name for name, loss in losses.items() if not math.isfinite(loss)]

    @property
    def _is_kept(self) -> bool:
        """Return whether this is the run itself, not a trial of it in a temporary folder."""
        return self.context.run_dir.path == Path(self.context.spec.run_dir)

    @property
    def _folder(self) -> str:
        return shlex.quote(str(self.context.run_dir.path))

    def _last_good(self) -> str:
        saved = committed(self.context.run_dir.checkpoints)
        if not saved:
            return "no checkpoint was saved before"
        return (
            f"the last good checkpoint is {saved[0]}: export it with "
            f"orchestrator export {self._folder} OUT --checkpoint=last"
        )

    def _other_settings(self) -> str:
        spec = self.context.spec
        is_16_bit = PRECISION_TRAITS[self.context.precision].is_16_bit
        other = " or precision=fp32" if is_16_bit else ""
        other += "".join(f", or fix {name}" for name in spec.dpo.own_losses)
        lr = f"optimizer.lr (now {spec.optimizer.lr:g})"
        return f"choose another run.name with a lower {lr}{other}"

    def _named(self, pair_ids: list[int]) -> str:
        """Return pairs with their rows, the first of them. Not collective."""
        rows: dict[str, list[str]] = {}
        for pair_id in pair_ids[:SHOWN]:
            place = self.pairs.place(pair_id)
            rows.setdefault(place.source, []).append(str(place.row))
        places = "; ".join(
            f"{_plural('row', numbers)} {', '.join(numbers)} of {source}"
            for source, numbers in rows.items()
        )
        return f"{_plural('pair', pair_ids)} {_listed([*map(str, pair_ids)])} ({places})"


def _set_name(name: str) -> str:
    return f"evaluation set {name}" if name else "the evaluation"


def _suspects(outputs: Sequence[tuple[PairBatch, StepOutput]]) -> Suspects:
    """Return the pairs of this rank's micro-batches, and what is not finite of them."""
    suspects = Suspects([], {name: {} for name in CAUSES})
    for batch, output in outputs:
        pair_ids = batch.pair_ids.tolist()
        suspects.pair_ids.extend(pair_ids)
        losses = output.losses.cpu()
        if losses.isfinite().all() and not output.loss.isfinite():
            losses = output.loss.cpu().expand(len(losses))
        numbers = (output.ref_logps.cpu().view(2, -1).sum(0), output.logps.cpu().view(2, -1).sum(0))
        for name, values in zip(CAUSES, (*numbers, losses), strict=True):
            of_pairs = zip(pair_ids, values.tolist(), strict=True)
            suspects.bad[name].update(
                (p, value) for p, value in of_pairs if not math.isfinite(value)
            )
    return suspects


def _values(bad: dict[int, float]) -> str:
    return " or ".join(sorted({str(value) for value in bad.values()}))


def _plural(noun: str, items: Sequence[object]) -> str:
    return noun if len(items) == 1 else f"{noun}s"


def _listed(names: Sequence[str]) -> str:
    """Join the first of several names, and the number of the others."""
    others = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {others} more" if others > 0 else "")
