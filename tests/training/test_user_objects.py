"""Objects of a Python user: wrong ones are refused, and a run with them equals that of the same
settings.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from orchestrator.data.collate import CollateContext
from orchestrator.run.local.debug import debug
from orchestrator.run.ray.driver import train
from orchestrator.settings.errors import UserError
from orchestrator.training.prepare import check_code
from orchestrator.training.user_objects import UserObjects
from support.run_files import losses
from support.tiny_parts import PAD
from support.tiny_settings import tiny_spec

EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


class Counting(TrainerCallback):
    """Counts of each event."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        if name in EVENTS:
            self.seen[name] = self.seen.get(name, 0) + 1
        return super().__getattribute__(name)


class Padding:
    """Pads as TRL does, and keeps what it is told."""

    def __init__(self) -> None:
        self.contexts: list[CollateContext] = []

    def __call__(
        self, rows: list[dict[str, Any]], context: CollateContext
    ) -> dict[str, torch.Tensor]:
        self.contexts.append(context)
        pairs = [
            (row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        values: dict[str, list[list[int]]] = {
            "input_ids": [],
            "attention_mask": [],
            "completion_mask": [],
        }
        for prompt, completion in pairs:
            used = len(prompt) + len(completion)
            values["input_ids"].append(prompt + completion + [PAD] * (width - used))
            values["attention_mask"].append([1] * used + [0] * (width - used))
            values["completion_mask"].append(
                [0] * len(prompt) + [1] * len(completion) + [0] * (width - used)
            )
        return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"callbacks": Counting()},
            r"callbacks = 'Counting': is not a list; use callbacks=\[\.\.\.\]",
        ),
        (
            {"data_collator": {"pad_token_id": 0}},
            "data_collator = 'dict': cannot be called; use a function",
        ),
        (
            {"compute_metrics": "mine:compute"},
            "compute_metrics = 'str': cannot be called; use a function",
        ),
        (
            {"ref_model": torch.nn.Linear(1, 1)},
            "ref_model = 'Linear': must be a function.*lambda policy: create_ref",
        ),
        ({"optimizers": torch.optim.SGD}, "optimizers = 'type': is not a pair of functions"),
    ],
)
def test_user_objects_of_a_wrong_type_are_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        UserObjects(**parts)


@pytest.mark.parametrize("call", [debug, train])
@pytest.mark.parametrize("value", ["run.yaml", {"run": {"name": "a"}}])
def test_settings_of_a_wrong_type_are_refused(call: Any, value: Any) -> None:
    with pytest.raises(
        UserError, match=f"is of type {type(value).__name__}, not a RunSpec; pass load_spec"
    ):
        call(value)


@pytest.mark.parametrize("call", [debug, train])
def test_arguments_of_trl_are_answered_with_the_setting(tmp_path: Path, call: Any) -> None:
    with pytest.raises(
        UserError, match=r"train_dataset = 'list': is not an argument here.*set data\.train"
    ):
        call(tiny_spec(tmp_path), train_dataset=[])
    with pytest.raises(TypeError, match="unexpected keyword argument 'callback'"):
        call(tiny_spec(tmp_path), callback=[])


def test_a_reference_in_python_and_in_the_settings_is_refused_before_a_model_is_built(
    tmp_path: Path,
) -> None:
    def never_called(policy: Any) -> Any:
        raise AssertionError

    spec = tiny_spec(tmp_path, reference={"kind": "int8"})
    with pytest.raises(UserError, match="ref_model = 'never_called': the settings define the ref"):
        check_code(spec, UserObjects(ref_model=never_called))


def test_a_collator_in_python_and_in_the_settings_is_refused(tmp_path: Path) -> None:
    for settings, line in (
        (
            {"data": {"collator": "math:prod"}},
            "data.collator = 'math:prod': cannot be combined with data_collator",
        ),
        (
            {"reference": {"cache": "full"}},
            "reference.cache = 'full': the batches of data_collator are not known in",
        ),
    ):
        with pytest.raises(UserError) as caught:
            debug(tiny_spec(tmp_path, **settings), data_collator=Padding())
        assert str(caught.value).startswith(line)
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


def test_callbacks_and_a_collator_act_as_those_of_the_settings(tmp_path: Path) -> None:
    padded = tiny_spec(tmp_path, run={"name": "padded"}, model={"attention": "padded"})
    debug(padded)
    counting, padding = Counting(), Padding()
    spec = tiny_spec(tmp_path, run={"name": "given"})
    debug(spec, callbacks=[counting], data_collator=padding)
    assert losses(spec.run_dir) == losses(padded.run_dir)
    assert counting.seen == {
        name: {"on_step_end": 4, "on_log": 7, "on_evaluate": 2}.get(name, 1) for name in EVENTS
    }
    assert {context.step for context in padding.contexts} == {0, 1, 2, 3, 4}
