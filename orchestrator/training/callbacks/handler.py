"""Fire transformers.TrainerCallbacks on rank 0 and collect their requests, on which the trainer
makes ranks agree.
"""

import errno
import json
import logging
import math
from bdb import BdbQuit
from typing import Any

from orchestrator.callback_api import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from orchestrator.settings.errors import exit_error
from orchestrator.training.callbacks.training_args import TrainingArgs
from orchestrator.user_time import USER_TIME

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# in the order of decisions.Decisions, from `finish` on
REQUESTS = (
    "should_training_stop",
    "should_epoch_stop",
    "should_save",
    "should_evaluate",
    "should_log",
)


class Callbacks:
    """The callbacks of rank 0 (empty on other ranks), with their TrainerState and TrainerControl.

    A callback that raises is reported once and dropped, unless it has a true attribute `essential`.
    One that finds the disk full is called again at the next event: it may have room by then.
    """

    def __init__(
        self, callbacks: list[TrainerCallback], args: TrainingArgs, objects: dict[str, Any]
    ) -> None:
        self.callbacks, self.args, self.objects = callbacks, args, objects
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            num_train_epochs=math.ceil(args.num_train_epochs),
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps or args.max_steps,
            save_steps=args.save_steps or args.max_steps,
            train_batch_size=args.per_device_train_batch_size,
            log_history=[],
        )
        self._found_full = set[tuple[int, str]]()  # callbacks and events
        self._built_with = {id(callback): _arguments(callback) for callback in callbacks}

    def fire(self, event: str, **extra: Any) -> None:
        """Call `event` of each callback in turn, as transformers' CallbackHandler does."""
        for callback in list(self.callbacks):
            try:
                with USER_TIME.of(f"{type(callback).__name__}.{event}"):
                    returned = getattr(callback, event)(
                        self.args, self.state, self.control, **self.objects, **extra
                    )
            except BdbQuit:  # quitting the debugger in a callback ends the run
                raise
            except SystemExit as error:
                name = f"{type(callback).__name__}.{event}"
                raise exit_error(error, name, f"step {self.state.global_step}") from error
            except Exception as error:
                if not self._is_kept(callback, event, error):
                    self._drop(callback, event)
                continue
            if isinstance(returned, TrainerControl):
                self.control = returned

    def begin_epoch(self, resumed: bool) -> None:
        """Fire on_epoch_begin. resumed: the epoch had begun before, and requests made in it still
        apply.
        """
        if not resumed:
            self.control.should_epoch_stop = False
        self.fire("on_epoch_begin")

    def end_step(self, *, log: bool, evaluate: bool, save: bool, is_last: bool) -> None:
        """Fire on_step_end with the flags of what is due now, as transformers shows them. These are
        not requests, and callbacks cannot cancel them.
        """
        due = {
            "should_log": log,
            "should_evaluate": evaluate,
            "should_save": save,
            "should_training_stop": is_last,
        }
        for name in (shown := [name for name, is_due in due.items() if is_due]):
            setattr(self.control, name, True)
        self.fire("on_step_end")
        for name in shown:
            setattr(self.control, name, False)

    def _is_kept(self, callback: TrainerCallback, event: str, error: Exception) -> bool:
        """Keep a callback that found the disk full, with one line for each event."""
        if not isinstance(error, OSError) or error.errno not in DISK_FULL:
            return False
        place = (id(callback), event)
        if place not in self._found_full:
            self._found_full.add(place)
            message = "%s found the disk full in %s (%s) and is called again at the next event"
            logger.warning(message, type(callback).__name__, event, error)
        return True

    def _drop(self, callback: TrainerCallback, event: str) -> None:
        """Drop a callback that raised; re-raise if it is essential.

        To be called while the exception is handled.
        """
        if getattr(callback, "essential", False):
            raise
        self.callbacks.remove(callback)
        logger.exception(
            "%s raised in %s and is dropped; training continues", type(callback).__name__, event
        )

    def take_requests(self) -> list[int]:
        """Return the requests since the last call, as flags in the order of REQUESTS."""
        requests = [int(getattr(self.control, name)) for name in REQUESTS]
        self.control = TrainerControl()
        return requests

    def exported(self) -> dict[str, Any]:
        """Return the states of stateful callbacks (transformers' ExportableState), pending
        requests, and the history in TrainerState.
        """
        states: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = []
        for callback in list(self.callbacks):
            if isinstance(callback, ExportableState):
                try:
                    state = json.loads(json.dumps(callback.state()))
                    states.append(
                        (type(callback).__qualname__, state, self._built_with.get(id(callback)))
                    )
                except Exception:
                    self._drop(callback, "state")
        return {
            "callbacks": states,
            "asked": [name for name in REQUESTS if getattr(self.control, name)],
            "best_metric": self.state.best_metric,
            "best_global_step": self.state.best_global_step,
            "log_history": self.state.log_history,
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Restore a result of `exported` into the callbacks of the same class, in order."""
        waiting = list(exported["callbacks"])
        for callback in list(self.callbacks):
            name = type(callback).__qualname__
            entry = next((entry for entry in waiting if entry[0] == name), None)
            if entry and isinstance(callback, ExportableState):
                waiting.remove(entry)
                _, state, *built_with = entry  # checkpoints of older versions have no third item
                try:
                    self._restore_state(callback, state, built_with[0] if built_with else None)
                except Exception:
                    self._drop(callback, "from_state")
        for name in exported["asked"]:
            setattr(self.control, name, True)
        self.state.best_metric = exported["best_metric"]
        self.state.best_global_step = exported["best_global_step"]
        self.state.log_history = exported["log_history"]

    def _restore_state(
        self, callback: TrainerCallback, state: dict[str, Any], built_with: dict[str, Any] | None
    ) -> None:
        """Restore a state into an existing callback, like ExportableState.from_state.

        Arguments that the run changed are restored, unless the user has changed them since.
        """
        arguments = state.get("args")
        if (
            arguments
            and built_with is not None
            and built_with == self._built_with.get(id(callback)) != arguments
        ):
            vars(callback).update(vars(type(callback)(**arguments)))
        for name, value in state.get("attributes", {}).items():
            setattr(callback, name, value)


def _arguments(callback: TrainerCallback) -> dict[str, Any] | None:
    """Return the constructor arguments in a callback's state, as JSON types; None if it has
    none.
    """
    if not isinstance(callback, ExportableState):
        return None
    try:
        return json.loads(json.dumps(callback.state().get("args")))
    except Exception:  # some states are complete only after training has begun
        return None
