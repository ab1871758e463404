"""Build the callbacks of a run: ours, those of the settings and those of a Python user."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from orchestrator.callback_api import EarlyStoppingCallback, TrainerCallback
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trackers import TRACKERS
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.callbacks.jsonl import JsonlCallback
from orchestrator.training.callbacks.wandb import WandbCallback
from orchestrator.training.rundir import RunDir
from orchestrator.user_code import user_attribute, user_code

UserCallback = TrainerCallback | type[TrainerCallback]


class _Entry(NamedTuple):
    """A callback of the settings or of a Python user."""

    name: str
    callback: Any  # a class or an object
    kwargs: dict[str, Any]


def build_callbacks(
    spec: RunSpec, run_dir: RunDir, by_user: Sequence[UserCallback] | None = None
) -> list[TrainerCallback]:
    """Build our callbacks, those of the settings and those of a Python user, in this order; on rank
    0 only.

    Raises:
        UserError: a user's callback cannot be imported or built.
    """
    callbacks: list[TrainerCallback] = [ConsoleCallback(), JsonlCallback(run_dir.metrics)]
    if spec.wandb.mode != "disabled":
        callbacks.append(WandbCallback(spec, run_dir))
    if (stopping := spec.evaluation.early_stopping) is not None:
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
    return callbacks + [_built(entry) for entry in _entries(spec, by_user)]


def check_callbacks(spec: RunSpec, by_user: Sequence[UserCallback] | None = None) -> None:
    """Check that a user's callbacks can be imported and accept their arguments, without building
    them.

    Only rank 0 builds them: a constructor may open a file.

    Raises:
        UserError: one cannot be imported, is not a TrainerCallback, or does not accept its
            arguments.
    """
    for name, callback, kwargs in _entries(spec, by_user):
        is_object = isinstance(callback, TrainerCallback)
        kind: Any = type(callback) if is_object else callback
        if not (inspect.isclass(kind) and issubclass(kind, TrainerCallback)):
            rule = "is not a transformers.TrainerCallback"
            raise UserError("callbacks", name, rule, "derive the class from it")
        try:
            if not is_object:
                inspect.signature(kind).bind(**kwargs)
        except TypeError as error:
            rule = f"cannot be built ({error})"
            cure = "write its arguments as {path, kwargs}; in Python, an object"
            raise UserError("callbacks", name, rule, cure) from None
        metric = spec.evaluation.metric_for_best
        if kind.__name__ == "EarlyStoppingCallback" and not metric:
            rule = "EarlyStoppingCallback needs it, and data.eval"
            cure = "for example evaluation.metric_for_best=loss"
            raise UserError("evaluation.metric_for_best", metric, rule, cure)


def _entries(spec: RunSpec, by_user: Sequence[UserCallback] | None) -> list[_Entry]:
    """Return the callbacks of the settings, then those of a Python user."""
    entries = [_Entry(each.path, _class_at(each.path), each.kwargs) for each in spec.callbacks]
    for callback in by_user or ():
        entries.append(_Entry(getattr(callback, "__name__", type(callback).__name__), callback, {}))
    return entries


def _class_at(path: str) -> Any:
    """Return the class of a tracker's name or of module:attr."""
    if path not in TRACKERS:
        return user_attribute("callbacks", path)
    from orchestrator.training.callbacks.trackers import tracker

    return tracker(path)


def _built(entry: _Entry) -> TrainerCallback:
    if isinstance(entry.callback, TrainerCallback):
        return entry.callback
    cure = "fix its constructor, or its kwargs"
    with user_code("callbacks", entry.name, "when it is built", cure):
        return entry.callback(**entry.kwargs)
