"""User code of our run: the loss as a user's function, and the injector around each step."""

from typing import Any

import torch
import torch.nn.functional as F
from injector import Injector, note
from transformers import TrainerCallback

from orchestrator.training.trainer import Trainer

note("alive")
ranks: list[Injector] = []  # the one of this process, from its first step on
forward_backward = Trainer.forward_backward


def loss(terms: Any, dpo: Any) -> torch.Tensor:
    """DPO, times the injector's factor."""
    chosen = terms.chosen_logps - terms.ref_chosen_logps
    rejected = terms.rejected_logps - terms.ref_rejected_logps
    factor = ranks[0].factor if ranks else 1.0
    return -F.logsigmoid(dpo.beta * (chosen - rejected)) * factor


def with_faults(trainer: Any, *args: Any) -> Any:
    """Callbacks run on rank 0 only; this runs on every rank."""
    if not ranks:
        ranks.append(Injector(trainer.context.world.rank))
    ranks[0].begin(trainer.progress.step + 1)
    return forward_backward(trainer, *args)


class Steps(TrainerCallback):
    """Notes each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ranks[0].done(state.global_step)


Trainer.forward_backward = with_faults
