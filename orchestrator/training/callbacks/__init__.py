"""Fire transformers.TrainerCallbacks on rank 0 and collect their requests, on which the trainer
makes ranks agree.
"""

import inspect
import json
import logging
import math
from bdb import BdbQuit
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from orchestrator.callback_api import (
    EarlyStoppingCallback,
    ExportableState,
    IntervalStrategy,
    SaveStrategy,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from orchestrator.settings.errors import UserError
from orchestrator.settings.precision import Precision
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trackers import TRACKERS
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.callbacks.jsonl import JsonlCallback
from orchestrator.training.callbacks.wandb import WandbCallback
from orchestrator.training.rundir import RunDir
from orchestrator.user_code import user_attribute
from orchestrator.world import World

logger = logging.getLogger(__name__)

REQUESTS = (
    "should_training_stop",
    "should_epoch_stop",
    "should_save",
    "should_evaluate",
    "should_log",
)


@dataclass(frozen=True)
class TrainingArgs:
    """The read-only `args` of callbacks, with the names of TrainingArguments (a real one would
    initialise devices).
    """

    output_dir: str
    run_name: str
    seed: int
    max_steps: int
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    lr_scheduler_type: str
    optim: str
    bf16: bool
    fp16: bool
    tf32: bool
    gradient_checkpointing: bool
    max_length: int | None
    beta: float
    loss_type: str | list[str]
    logging_dir: str
    logging_steps: int
    eval_steps: int | None
    eval_on_start: bool
    eval_strategy: IntervalStrategy
    save_steps: int | None
    save_strategy: SaveStrategy
    save_total_limit: int
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    report_to: tuple[str, ...]
    project: str
    resume_from_checkpoint: str | None
    logging_strategy: IntervalStrategy = IntervalStrategy.STEPS
    logging_first_step: bool = False
    eval_delay: float = 0
    disable_tqdm: bool = True
    push_to_hub: bool = False
    hub_private_repo: bool | None = None
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | None = None
    process_index: int = 0  # callbacks run on rank 0
    local_process_index: int = 0
    should_log: bool = True
    should_save: bool = True

    @property
    def train_batch_size(self) -> int:
        """Return the number of pairs in a forward pass on one rank."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Return the same number: evaluation has the same micro-batches."""
        return self.per_device_train_batch_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, like TrainingArguments.to_dict."""
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in asdict(self).items()
        }

    def to_json_string(self) -> str:
        """Return JSON, like TrainingArguments.to_json_string."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return numbers and strings only, like TrainingArguments.to_sanitized_dict."""
        values = {
            **self.to_dict(),
            "train_batch_size": self.train_batch_size,
            "eval_batch_size": self.eval_batch_size,
        }
        plain = (bool, int, float, str)
        return {
            name: value if isinstance(value, plain) else str(value)
            for name, value in values.items()
        }


def training_args(
    spec: RunSpec,
    run_dir: RunDir,
    max_steps: int,
    epochs: float,
    world: World,
    precision: Precision,
    resumed_from: str | None = None,
) -> TrainingArgs:
    """Return the settings of a run under TrainingArguments' names."""
    micro = spec.batch.micro_batch_size or 1
    return TrainingArgs(
        output_dir=str(run_dir.path),
        run_name=spec.run.name,
        seed=spec.run.seed,
        max_steps=max_steps,
        num_train_epochs=epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-spec.batch.global_batch_size // (micro * world.size)),
        world_size=world.size,
        learning_rate=spec.optimizer.lr,
        weight_decay=spec.optimizer.weight_decay,
        warmup_steps=spec.scheduler.warmup(max_steps),
        max_grad_norm=spec.training.max_grad_norm or 0.0,
        lr_scheduler_type=spec.scheduler.name,
        optim=spec.optimizer.name,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=precision == "tf32",
        gradient_checkpointing=spec.training.gradient_checkpointing,
        max_length=spec.data.max_length,
        beta=spec.dpo.beta,
        loss_type=spec.dpo.loss_type,
        logging_dir=str(run_dir.logs),
        logging_steps=spec.training.logging_steps,
        eval_steps=spec.evaluation.every_steps,
        eval_on_start=bool(spec.data.eval_sets) and spec.evaluation.at_start,
        eval_strategy=_eval_strategy(spec),
        save_steps=spec.checkpoint.every_steps,
        save_strategy=_save_strategy(spec),
        save_total_limit=spec.checkpoint.keep,
        load_best_model_at_end=spec.checkpoint.export == "best",
        metric_for_best_model=spec.evaluation.metric_for_best,
        greater_is_better=spec.greater_is_better if spec.evaluation.metric_for_best else None,
        report_to=_reports_to(spec),
        project=spec.wandb.project,
        resume_from_checkpoint=resumed_from,
    )


def _reports_to(spec: RunSpec) -> tuple[str, ...]:
    named = [entry.path for entry in spec.callbacks if entry.path in TRACKERS]
    return (*named, *["wandb"] * (spec.wandb.mode != "disabled"))


def _eval_strategy(spec: RunSpec) -> IntervalStrategy:
    """Return transformers' strategy, which is by epoch or by steps; if both are set, by steps.
    Without either, the evaluation after the last step counts as one by steps.
    """
    if not spec.data.eval_sets:
        return IntervalStrategy.NO
    by_epoch = spec.evaluation.every_epoch and spec.evaluation.every_steps is None
    return IntervalStrategy.EPOCH if by_epoch else IntervalStrategy.STEPS


def _save_strategy(spec: RunSpec) -> SaveStrategy:
    by_steps = spec.checkpoint.every_steps is not None or spec.evaluation.metric_for_best is None
    return SaveStrategy.STEPS if by_steps else SaveStrategy.BEST


class Callbacks:
    """The callbacks of rank 0 (empty on other ranks), with their TrainerState and TrainerControl.

    A callback that raises is reported once and dropped, unless it has a true attribute `essential`.
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
        self._built_with = {id(callback): _arguments(callback) for callback in callbacks}

    def fire(self, event: str, **extra: Any) -> None:
        """Call `event` of each callback in turn, as transformers' CallbackHandler does."""
        for callback in list(self.callbacks):
            try:
                returned = getattr(callback, event)(
                    self.args, self.state, self.control, **self.objects, **extra
                )
            except BdbQuit:  # quitting the debugger in a callback ends the run
                raise
            except Exception:
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

    def end_step(self, *, log: bool, evaluate: bool, save: bool, stop: bool) -> None:
        """Fire on_step_end with the flags of what is due now, as transformers shows them. These are
        not requests, and callbacks cannot cancel them.
        """
        due = {
            "should_log": log,
            "should_evaluate": evaluate,
            "should_save": save,
            "should_training_stop": stop,
        }
        for name in (shown := [name for name, is_due in due.items() if is_due]):
            setattr(self.control, name, True)
        self.fire("on_step_end")
        for name in shown:
            setattr(self.control, name, False)

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
        asked = [int(getattr(self.control, name)) for name in REQUESTS]
        self.control = TrainerControl()
        return asked

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
            found = next(
                (entry for entry in waiting if entry[0] == type(callback).__qualname__), None
            )
            if found and isinstance(callback, ExportableState):
                waiting.remove(found)
                _, state, *built_with = found  # checkpoints of older versions have no third entry
                try:
                    self._restore_state(callback, state, built_with[0] if built_with else None)
                except Exception:
                    self._drop(callback, "from_state")
        for name in exported["asked"]:
            setattr(self.control, name, True)
        self.state.best_metric, self.state.best_global_step = (
            exported["best_metric"],
            exported["best_global_step"],
        )
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


def build_callbacks(
    spec: RunSpec,
    run_dir: RunDir,
    given: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
) -> list[TrainerCallback]:
    """Build our callbacks, those of the settings and those of the caller, in this order; on rank 0
    only.

    Raises:
        UserError: a user's callback cannot be imported or built.
    """
    callbacks: list[TrainerCallback] = [ConsoleCallback(), JsonlCallback(run_dir.metrics)]
    if spec.wandb.mode != "disabled":
        callbacks.append(WandbCallback(spec, run_dir))
    if (stopping := spec.evaluation.early_stopping) is not None:
        callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
    return callbacks + [_built(*each) for each in _of_user(spec, given)]


def _of_user(spec: RunSpec, given: Sequence[Any] | None) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return name, class or object, and keyword arguments of each callback of the settings, then of
    the caller.
    """
    named = [(entry.path, _at(entry.path), entry.kwargs) for entry in spec.callbacks]
    return named + [
        (getattr(each, "__name__", type(each).__name__), each, {}) for each in given or ()
    ]


def _at(path: str) -> Any:
    if path not in TRACKERS:
        return user_attribute("callbacks", path)
    from orchestrator.training.callbacks.trackers import (
        tracker,
    )  # imports each tracker that is installed

    return tracker(path)


def _built(name: str, made: Any, kwargs: dict[str, Any]) -> TrainerCallback:
    if isinstance(made, TrainerCallback):
        return made
    try:
        return made(**kwargs)
    except Exception as error:
        reason = f"cannot be built ({type(error).__name__}: {error})"
        raise UserError("callbacks", name, reason, "fix its constructor, or its kwargs") from None


def check_callbacks(
    spec: RunSpec, given: Sequence[TrainerCallback | type[TrainerCallback]] | None = None
) -> None:
    """Check that a user's callbacks can be imported and accept their arguments, without building
    them.

    Only rank 0 builds them: a constructor may open a file.

    Raises:
        UserError: one cannot be imported, is not a TrainerCallback, or does not accept its
            arguments.
    """
    for name, made, kwargs in _of_user(spec, given):
        kind: Any = type(made) if isinstance(made, TrainerCallback) else made
        if not (inspect.isclass(kind) and issubclass(kind, TrainerCallback)):
            raise UserError(
                "callbacks",
                name,
                "is not a transformers.TrainerCallback",
                "derive the class from it",
            )
        try:
            if made is kind:
                inspect.signature(kind).bind(**kwargs)
        except TypeError as error:
            reason, cure = (
                f"cannot be built ({error})",
                "write its arguments as {path, kwargs}; in Python, an object",
            )
            raise UserError("callbacks", name, reason, cure) from None
        if kind.__name__ == "EarlyStoppingCallback" and not spec.evaluation.metric_for_best:
            raise UserError(
                "evaluation.metric_for_best",
                spec.evaluation.metric_for_best,
                "EarlyStoppingCallback needs it, and data.eval",
                "for example evaluation.metric_for_best=loss",
            )
