"""Decide what follows a step: by the settings, and by requests on which all ranks agree."""

from typing import NamedTuple

import torch

from orchestrator.settings.run import RunSpec
from orchestrator.training.context import RunContext


class Decisions(NamedTuple):
    """The actions that all ranks take before the next update."""

    # the gradient: no update; outside fp16 it ends the run
    non_finite: bool = False
    suspend: bool = False  # save, to be resumed later
    finish: bool = False  # end training for good: a callback's should_training_stop
    end_epoch: bool = False  # skip the rest of the epoch
    save: bool = False
    evaluate: bool = False
    log: bool = False


def agree(
    context: RunContext, requests: list[int], finite: torch.Tensor | None = None
) -> Decisions:
    """Combine the requests of all ranks in one small reduction, so that all act on them at the same
    step.

    requests: of this rank's callbacks, in the order of callbacks.REQUESTS. finite: whether its
    gradient is.
    """
    stop = int(context.session.stop_requested() is not None)
    flags = torch.tensor([0, stop, *requests], dtype=torch.int32, device=context.world.device)
    if finite is not None:
        flags[0] = ~finite
    return Decisions(*map(bool, context.world.max(flags).tolist()))


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
