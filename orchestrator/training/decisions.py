"""Decide what follows a step: by the settings, and by requests on which all ranks agree."""

import math
from typing import NamedTuple

import torch

from orchestrator.settings.run import RunSpec
from orchestrator.training.context import RunContext


class Decisions(NamedTuple):
    """The actions that all ranks take before the next update."""

    # the loss or gradient: no update; outside fp16 it ends the run by default
    non_finite: bool = False
    suspend: bool = False  # save, to be resumed later
    finish: bool = False  # end training for good: a callback's should_training_stop
    end_epoch: bool = False  # skip the rest of the epoch
    save: bool = False
    evaluate: bool = False
    log: bool = False


class StepNumbers(NamedTuple):
    """Numbers of a step before its update, on the device."""

    finite: torch.Tensor  # whether this rank's gradient is
    loss: torch.Tensor  # this rank's part of the mean over the global batch
    grad_norm: torch.Tensor  # the same on all ranks


class Agreement(NamedTuple):
    """The decisions of all ranks, and loss and gradient norm of the global batch."""

    decisions: Decisions
    loss: float = 0.0
    grad_norm: float = 0.0


def agree(
    context: RunContext, requests: list[int], numbers: StepNumbers | None = None
) -> Agreement:
    """Combine the requests of all ranks in one small reduction, so that all act on them at the same
    step.

    requests: of this rank's callbacks, in the order of callbacks.REQUESTS. numbers: of a step that
    has no update yet.
    """
    world = context.world
    stop = int(context.session.stop_requested() is not None)
    flags = [0, stop, *requests, 0, 0]
    sums = torch.tensor(flags, dtype=torch.float64, device=world.device)
    if numbers is not None:
        sums[0], sums[-2] = ~numbers.finite, numbers.loss
        sums[-1] = numbers.grad_norm if world.is_main else 0.0
    *flags, loss, grad_norm = world.sum(sums).tolist()
    flags[0] += not math.isfinite(loss)
    return Agreement(Decisions(*map(bool, flags)), loss, grad_norm)


def due_after(spec: RunSpec, step: int, is_last: bool) -> Decisions:
    """Return what the settings schedule after a step."""

    def is_at(every: int | None) -> bool:
        return every is not None and step % every == 0

    evaluation = spec.evaluation
    # then it follows the end of the epoch
    by_epoch = evaluation.every_epoch and evaluation.every_steps is None
    return Decisions(
        save=is_at(spec.checkpoint.every_steps) or is_last,
        evaluate=is_at(evaluation.every_steps) or (is_last and not by_epoch),
        log=is_at(spec.training.logging_steps) or is_last,
    )
