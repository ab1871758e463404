"""A callback sees of a run of ours what it sees of one of TRL's: each event at its place, with the
same state.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from orchestrator.models.policy import build_policy, load_tokenizer
from orchestrator.settings.run import RunSpec
from orchestrator.training import worker
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from orchestrator.training.user_objects import UserObjects
from orchestrator.world import World
from support.tiny_settings import random_rows, tiny_spec, write_jsonl
from support.training_parity import kept_signals
from support.trl_trainer import need_trl, trl_trainer

need_trl()

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Heard(NamedTuple):
    """The arguments of a callback at one event."""

    event: str
    step: int
    epoch: float
    names: list[str]  # names of logs or metrics
    due: list[str]  # what will happen, where an update has just been made
    objects: list[str]  # names of keyword arguments
    state: tuple[Any, ...]


class Recording(TrainerCallback):
    """Keeps all that it hears."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []

    def hear(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For every event."""
        logs = kwargs.pop("logs", None) or kwargs.pop("metrics", None) or {}
        due = [
            name
            for name in ("log", "evaluate", "save", "training_stop")
            if getattr(control, f"should_{name}")
        ]
        facts = (
            state.max_steps,
            state.num_train_epochs,
            state.train_batch_size,
            len(state.log_history),
        )
        self.heard.append(
            Heard(
                event,
                state.global_step,
                round(state.epoch, 9),
                sorted(logs),
                due if event == "on_step_end" else [],
                sorted(kwargs),
                ()
                if event == "on_init_end"
                else (*facts, state.is_world_process_zero, state.trial_name),
            )
        )


for name in EVENTS:
    setattr(
        Recording, name, lambda self, *args, event=name, **kwargs: self.hear(event, *args, **kwargs)
    )

# two epochs of three steps
TRAINED, HELD_OUT, PAIRS, MICRO, EVERY = (random_rows(12), random_rows(4, seed=1), 4, 2, 2)


def spec_of(folder: Path) -> RunSpec:
    train, held_out = (
        write_jsonl(folder / "pairs.jsonl", TRAINED),
        write_jsonl(folder / "held_out.jsonl", HELD_OUT),
    )
    return tiny_spec(
        folder,
        data={"train": str(train), "eval": str(held_out), "max_length": None},
        batch={"global_batch_size": PAIRS, "micro_batch_size": MICRO},
        training={"max_steps": None, "epochs": 2, "logging_steps": EVERY},
        # TRL would have to be told eval_on_start
        evaluation={"every_steps": EVERY, "at_start": False},
        checkpoint={"every_steps": EVERY},
    )


def of_ours(spec: RunSpec) -> list[Heard]:
    recording, run_dir = Recording(), RunDir(spec.run_dir)
    run_dir.begin(spec)
    world = World(0, 1, 0, torch.device("cpu"))
    with kept_signals():
        worker.run(spec, world, LocalSession(run_dir, 0), UserObjects(callbacks=[recording]))
    return recording.heard


def of_trl(spec: RunSpec, folder: Path) -> list[Heard]:
    from datasets import Dataset

    recording, tokenizer = Recording(), load_tokenizer(spec)
    build_policy(spec, tokenizer, torch.float32).save_pretrained(folder / "model")
    trainer = trl_trainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        tokenizer,
        TRAINED,
        eval_dataset=Dataset.from_list(HELD_OUT),
        callbacks=[recording],
        output_dir=str(folder),
        per_device_train_batch_size=MICRO,
        per_device_eval_batch_size=MICRO,
        gradient_accumulation_steps=PAIRS // MICRO,
        num_train_epochs=2,
        logging_steps=EVERY,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        max_length=None,
    )
    trainer.train()
    return recording.heard


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Heard], list[Heard]]:
    folder = tmp_path_factory.mktemp("callbacks")
    spec = spec_of(folder)
    return of_ours(spec), of_trl(spec, folder / "trl")


def test_every_event_is_at_its_place_with_the_same_state(
    heard: tuple[list[Heard], list[Heard]],
) -> None:
    ours, trls = ([each._replace(names=[]) for each in side] for side in heard)
    # where an epoch ends, ours is saved after that: a run that is resumed does not come back to it
    at = max(number for number, each in enumerate(trls) if each.event == "on_save")
    assert trls[at + 1].event == "on_epoch_end"
    trls[at], trls[at + 1] = trls[at + 1], trls[at]
    assert ours == trls
    # which training never has
    assert {each.event for each in ours} == {*EVENTS} - {"on_predict", "on_push_begin"}


def test_logs_and_metrics_have_the_same_names(heard: tuple[list[Heard], list[Heard]]) -> None:
    ours, trls = (
        [set(each.names) for each in side if each.event in ("on_log", "on_evaluate")]
        for side in heard
    )
    # tokens are counted while training alone, and at an evaluation TRL says the same number again
    assert ours == [logs - {"eval_num_tokens"} for logs in trls]
