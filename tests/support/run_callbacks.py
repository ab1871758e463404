"""Callbacks that tests add to a run by their path."""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from orchestrator.models.logps import sequence_logps
from orchestrator.training.manifest import step_folder, verify
from support.tiny_parts import pair_batch


class StopsAt(TrainerCallback):
    """Asks for a stop after a step; the same command then resumes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            Path(args.output_dir, "STOP").touch()


def stops_at(step: int) -> str:
    """The word that adds StopsAt to a run."""
    return f"callbacks=[{{path: 'support.run_callbacks:StopsAt', kwargs: {{step: {step}}}}}]"


class EndsEpoch(TrainerCallback):
    """Asks for the end of the epoch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step == self.step


class NotesSaves(TrainerCallback):
    """Writes RUN_DIR/saves.jsonl: of which step it was told, before which one it had begun, in
    which thread, and what is wrong with the checkpoint. Lets a save in the background end while a
    step is under way; asks for one when there is an evaluation.
    """

    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = state.global_step + 1
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = step_folder(Path(args.output_dir, "checkpoints"), state.global_step)
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "begun": self.begun,
            "in_main": threading.current_thread() is threading.main_thread(),
            "wrong": verify(folder),
        }
        with open(Path(args.output_dir, "saves.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


class KeepsLogps(TrainerCallback):
    """Writes what the trained policy, as it is in memory, says of PAIRS made-up pairs: [2B],
    fp64.
    """

    PAIRS = 6

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        model.eval()
        torch.save(
            sequence_logps(model, pair_batch(self.PAIRS, packed=True)),
            Path(args.output_dir, "logps.pt"),
        )
