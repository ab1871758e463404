"""Callbacks observe: one that raises is dropped, requests are collected, states come back,
arguments are frozen.
"""

import errno
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from orchestrator.settings.errors import UserError
from orchestrator.training.callbacks import wandb as wandb_callback
from orchestrator.training.callbacks.build import build_callbacks, check_callbacks
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.callbacks.handler import REQUESTS
from orchestrator.training.callbacks.jsonl import JsonlCallback
from orchestrator.training.callbacks.wandb import WandbCallback, without_secrets
from orchestrator.training.rundir import RunDir
from support.callback_handlers import callbacks
from support.tiny_settings import tiny_spec


class Recording(TrainerCallback):
    """Remembers what it was called with."""

    def __init__(self, log: list[Any] | None = None) -> None:
        self.log: list[Any] = [] if log is None else log

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.append((args, state, control, kwargs))


class Raising(TrainerCallback):
    """Cannot do anything."""

    calls = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls += 1
        control.should_save = True
        raise ValueError("cannot")


class Counting(TrainerCallback, ExportableState):
    """Keeps a number."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}


class Asking(TrainerCallback):
    """Asks for things in the way of transformers' own callbacks."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
        for name in self.names:
            setattr(control, name, True)
        return control


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


def test_callbacks_are_called_in_order_with_all_objects(tmp_path: Path) -> None:
    log: list[Any] = []
    handler = callbacks(
        tmp_path, Recording(log), Recording(log), model="the model", optimizer="the optimizer"
    )
    handler.fire("on_step_end", metrics=3)
    assert len(log) == 2
    args, state, control, kwargs = log[0]
    assert (args, state, control) == (handler.args, handler.state, handler.control)
    assert kwargs == {"model": "the model", "optimizer": "the optimizer", "metrics": 3}


def test_a_callback_that_raises_is_reported_once_and_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raising, recording = Raising(), Recording()
    handler = callbacks(tmp_path, raising, recording)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            handler.fire("on_step_end")
    assert raising.calls == 1
    assert len(recording.log) == 3
    assert handler.callbacks == [recording]
    [record] = caplog.records
    assert record.getMessage() == "Raising raised in on_step_end and is dropped; training continues"
    assert record.exc_info is not None


def test_a_callback_that_finds_the_disk_full_is_called_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Writes(TrainerCallback):
        calls = 0

        def on_log(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            if self.calls < 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    handler = callbacks(tmp_path, writes := Writes())
    for _ in range(4):
        handler.fire("on_log")
    assert (handler.callbacks, writes.calls) == ([writes], 4)
    [record] = caplog.records
    assert record.getMessage() == (
        "Writes found the disk full in on_log ([Errno 28] No space left on device) and is called "
        "again at the next event"
    )


def test_an_essential_callback_that_raises_ends_training(tmp_path: Path) -> None:
    raising = Raising()
    raising.essential = True
    with pytest.raises(ValueError, match="cannot"):
        callbacks(tmp_path, raising).fire("on_step_end")


@pytest.mark.parametrize(
    "names", [[], ["should_save"], ["should_training_stop", "should_log"], list(REQUESTS)]
)
def test_requests_are_collected_once(tmp_path: Path, names: list[str]) -> None:
    handler = callbacks(tmp_path, Asking(*names[:1]), Asking(*names[1:]))
    handler.fire("on_step_end")
    assert handler.take_requests() == [int(name in names) for name in REQUESTS]
    assert handler.take_requests() == [0] * len(REQUESTS)


def test_actions_of_the_schedule_show_in_control_but_are_no_requests(tmp_path: Path) -> None:
    recording = Recording()
    handler = callbacks(tmp_path, Asking("should_save"), recording)
    shown: list[dict[str, bool]] = []
    recording.on_step_end = lambda args, state, control, **_: shown.append(dict(vars(control)))
    handler.end_step(log=True, evaluate=False, save=False, is_last=True)
    assert [name for name in REQUESTS if shown[0][name]] == [
        "should_training_stop",
        "should_save",
        "should_log",
    ]
    assert handler.take_requests() == [int(name == "should_save") for name in REQUESTS]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_request_to_end_an_epoch_holds_for_that_epoch_only(tmp_path: Path, resumed: bool) -> None:
    handler = callbacks(tmp_path, Asking("should_epoch_stop", "should_log"))
    handler.fire("on_step_end")
    other = callbacks(tmp_path)
    # what was asked is not lost when the process dies
    other.restore(json.loads(json.dumps(handler.exported())))
    other.begin_epoch(resumed)
    assert other.take_requests() == [0, int(resumed), 0, 0, 1]


def test_states_come_back_to_the_callbacks_of_their_class_in_order(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=3)
    stopping.early_stopping_patience_counter = 2
    handler = callbacks(tmp_path, Counting(5), Recording(), stopping, Counting(6))
    handler.state.best_metric, handler.state.best_global_step = 0.25, 3
    handler.state.log_history = [{"loss": 0.5, "step": 1}]
    exported = json.loads(json.dumps(handler.exported()))

    first, second, fresh = Counting(), Counting(), EarlyStoppingCallback(early_stopping_patience=3)
    other = callbacks(tmp_path, fresh, first, second, Counting(-1))
    other.restore(exported)
    assert (first.count, second.count, fresh.early_stopping_patience_counter) == (5, 6, 2)
    assert other.callbacks[-1].count == -1
    assert (other.state.best_metric, other.state.best_global_step) == (0.25, 3)
    assert other.state.log_history == [{"loss": 0.5, "step": 1}]


class Cooling(TrainerCallback, ExportableState):
    """Changes an argument of its own while it trains."""

    def __init__(self, heat: float, floor: float = 0.0) -> None:
        self.heat, self.floor, self.steps = heat, floor, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.heat, self.steps = self.heat / 2, self.steps + 1

    def state(self) -> dict[str, Any]:
        return {
            "args": {"heat": self.heat, "floor": self.floor},
            "attributes": {"steps": self.steps},
        }


@pytest.mark.parametrize(
    ("settings_now", "heat"),
    [({"heat": 8.0}, 4.0), ({"heat": 6.0}, 6.0), ({"heat": 8.0, "floor": 1.0}, 8.0)],
    ids=["unchanged", "changed", "another-argument-changed"],
)
def test_arguments_that_a_run_changed_come_back_unless_the_user_changed_them_too(
    tmp_path: Path, settings_now: dict[str, float], heat: float
) -> None:
    before = callbacks(tmp_path, Cooling(heat=8.0))
    before.fire("on_step_end")
    exported = json.loads(json.dumps(before.exported()))
    resumed = Cooling(**settings_now)
    callbacks(tmp_path, resumed).restore(exported)
    assert (resumed.heat, resumed.steps) == (heat, 1)
    # an older checkpoint
    of_before = {**exported, "callbacks": [entry[:2] for entry in exported["callbacks"]]}
    older = Cooling(**settings_now)
    callbacks(tmp_path, older).restore(of_before)
    assert (older.heat, older.steps) == (settings_now["heat"], 1)


def test_a_patience_changed_in_the_settings_holds_in_a_resumed_run(tmp_path: Path) -> None:
    before = EarlyStoppingCallback(early_stopping_patience=3)
    before.early_stopping_patience_counter = 2
    exported = json.loads(json.dumps(callbacks(tmp_path, before).exported()))
    resumed = EarlyStoppingCallback(early_stopping_patience=5)
    callbacks(tmp_path, resumed).restore(exported)
    assert (resumed.early_stopping_patience, resumed.early_stopping_patience_counter) == (5, 2)


def test_built_in_callbacks_run_before_the_users(tmp_path: Path, user_module: ModuleType) -> None:
    user_module.Counting = Counting
    user_module.ready = Recording()
    value = ["a_users_module:ready", {"path": "a_users_module:Counting", "kwargs": {"start": 4}}]
    spec = tiny_spec(tmp_path, callbacks=value, wandb={"mode": "offline"})
    built = build_callbacks(spec, RunDir(spec.run_dir), [Counting(5), Counting])
    assert [type(callback) for callback in built] == [
        ConsoleCallback,
        JsonlCallback,
        WandbCallback,
        Recording,
        Counting,
        Counting,
        Counting,
    ]
    assert [callback.count for callback in built[-3:]] == [4, 5, 0]
    spec = tiny_spec(tmp_path, wandb={"mode": "disabled"})
    assert WandbCallback not in [
        type(callback) for callback in build_callbacks(spec, RunDir(spec.run_dir))
    ]


@pytest.mark.parametrize(
    ("entry", "key", "words"),
    [
        ("a_users_module:nothing", "callbacks", "has no nothing"),
        (
            {"path": "a_users_module:Counting", "kwargs": {"begin": 1}},
            "callbacks",
            "cannot be built",
        ),
        ("a_users_module:Other", "callbacks", "is not a transformers.TrainerCallback"),
        (
            "transformers:EarlyStoppingCallback",
            "evaluation.metric_for_best",
            "EarlyStoppingCallback needs it",
        ),
    ],
)
def test_a_wrong_callback_is_refused(
    tmp_path: Path, user_module: ModuleType, entry: Any, key: str, words: str
) -> None:
    user_module.Counting, user_module.Other = Counting, dict
    with pytest.raises(UserError, match=words) as caught:
        check_callbacks(tiny_spec(tmp_path, callbacks=[entry]))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            print,
            "callbacks = 'print': is not a transformers.TrainerCallback; derive the class from it",
        ),
        (
            JsonlCallback,
            "callbacks = 'JsonlCallback': cannot be built .*'path'.*; in Python, an object",
        ),
        (EarlyStoppingCallback(3), "EarlyStoppingCallback needs it"),
    ],
)
def test_a_wrong_callback_in_python_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_callbacks(tiny_spec(tmp_path), [value])


def test_the_key_of_wandb_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another")  # and is put back after the test
    path = tmp_path / "key"
    spec = tiny_spec(tmp_path, wandb={"mode": "offline", "key_file": str(path)})
    with pytest.raises(
        UserError, match=r"wandb\.key_file = .*: cannot be read on .* \(No such file"
    ):
        WandbCallback(spec, RunDir(tmp_path / "run"))
    path.write_text("  0123456789\n")
    path.chmod(0o640)
    with pytest.raises(UserError, match="can be read by others; chmod 600"):
        WandbCallback(spec, RunDir(tmp_path / "run"))
    path.chmod(0o600)
    WandbCallback(spec, RunDir(tmp_path / "run"))
    assert os.environ["WANDB_API_KEY"] == "0123456789"
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        WandbCallback(spec, RunDir(tmp_path / "run"))


def test_no_secret_goes_to_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "the-secret-value")
    values = {
        "model": {"path": "hub/the-secret-value/x", "pad_token": "<pad>"},
        "callbacks": [{"kwargs": {"api_key": "short", "rate": 3}}],
    }
    assert without_secrets(values) == {
        "model": {"path": "hub/***/x", "pad_token": "<pad>"},
        "callbacks": [{"kwargs": {"api_key": "***", "rate": 3}}],
    }


def test_the_console_prints_step_epoch_and_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = callbacks(tmp_path, console := ConsoleCallback())
    handler.fire("on_train_begin")
    handler.state.global_step = 3
    handler.fire("on_log", logs={"loss": 0.51234, "rewards/accuracies": 0.75, "num_tokens": 100.0})
    handler.fire("on_log", logs={"eval_loss": 0.4, "eval_rewards/accuracies": 1.0})
    handler.fire("on_log", logs={"eval_odd_loss": 0.5, "eval_odd_rewards/accuracies": 0.25})
    handler.fire("on_save")
    handler.fire("on_train_end")
    lines = capsys.readouterr().out.splitlines()
    assert handler.callbacks == [console]  # it did not raise
    assert lines[0].startswith("step 3/4: loss 0.5123, accuracy 0.750")
    assert lines[1:] == [
        "evaluation after step 3: loss 0.4000, accuracy 1.000",
        "evaluation of odd after step 3: loss 0.5000, accuracy 0.250",
        "saved after step 3",
    ]


def test_wandb_online_without_a_key_records_offline_and_prints_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(wandb_callback, "_has_credentials", lambda _: False)
    monkeypatch.setattr(WandbCallback, "_init", lambda _, __, mode: modes.append(mode))
    spec = tiny_spec(tmp_path, wandb={"mode": "online"})
    WandbCallback(spec, RunDir(spec.run_dir)).on_train_begin(None, None, None)
    assert modes == ["offline"]
    assert "no key (set WANDB_API_KEY or wandb.key_file, or run `wandb login`)" in caplog.text
