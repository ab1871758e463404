"""Functions and objects that a Python user passes instead of naming them in the settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from orchestrator.callback_api import TrainerCallback
from orchestrator.data.user_collator import UserCollator
from orchestrator.engines.optim import Optimizers, check_functions
from orchestrator.models.reference_function import RefModel, check_function
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec

GivenCallback = TrainerCallback | type[TrainerCallback]
ComputeMetrics = Callable[[Any], Mapping[str, float]]


TRL_ARGUMENTS = {
    "model": "set model.path to its folder or hub name",
    "args": "write them as settings, by the names in docs/from-trl.md, and pass load_spec(FILE)",
    "train_dataset": "save it with save_to_disk(FOLDER), and set data.train to that folder",
    "eval_dataset": "save it with save_to_disk(FOLDER), and set data.eval to that folder",
    "processing_class": "set model.tokenizer to its folder or hub name",
    "tokenizer": "set model.tokenizer to its folder or hub name",
    "peft_config": "set model.lora",
}
"""Arguments of TRL's DPOTrainer, and their replacements."""


@dataclass(frozen=True)
class UserObjects:
    """A user's functions and objects, used instead of the corresponding settings; callbacks are
    added to theirs.

    Raises:
        UserError: a part has the wrong type.
    """

    ref_model: RefModel | None = None
    """policy -> reference, called on every rank."""
    optimizers: Optimizers | None = None
    """(params -> optimizer, optimizer -> schedule), called on every rank; None: use the settings.
    params are parameter groups, dicts with "params" and "weight_decay", as torch.optim.SGD(params,
    lr=1e-6) accepts them.
    """
    callbacks: Sequence[GivenCallback] | None = None
    """Fired on rank 0 after those of the settings: objects, or classes that need no arguments."""
    compute_metrics: ComputeMetrics | None = None
    """EvalPrediction -> additional metrics of an evaluation."""
    data_collator: UserCollator | None = None
    """Rows -> TRL's input_ids, attention_mask, completion_mask, called on every rank, like
    data.collator.
    """

    def __post_init__(self) -> None:
        check_function(self.ref_model)
        check_functions(self.optimizers)
        if not isinstance(self.callbacks, list | tuple | None):
            raise UserError(
                "callbacks", type(self.callbacks).__name__, "is not a list", "use callbacks=[...]"
            )
        for key in ("compute_metrics", "data_collator"):
            value = getattr(self, key)
            if not (value is None or callable(value)):
                raise UserError(
                    key,
                    type(value).__name__,
                    "cannot be called",
                    "use a function or a callable object",
                )

    @property
    def parts(self) -> dict[str, Any]:
        """Return the parts that are not None, by name."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in parts.items() if value is not None}


NOTHING = UserObjects()


def check_spec(spec: object) -> None:
    """Check that `spec` is a RunSpec, not the path of a file or a dict.

    Raises:
        UserError: it is not a RunSpec.
    """
    if not isinstance(spec, RunSpec):
        cure = "pass load_spec(...) of the file or dict, which checks it"
        raise UserError("spec", spec, f"is of type {type(spec).__name__}, not a RunSpec", cure)


def check_arguments(others: Mapping[str, object]) -> None:
    """Reject keyword arguments that the function does not have.

    Raises:
        UserError: an argument of TRL's, which is a setting here.
        TypeError: any other argument.
    """
    for name, value in others.items():
        if name not in TRL_ARGUMENTS:
            raise TypeError(f"unexpected keyword argument {name!r}")
        rule = "is not an argument here: every rank loads it from the settings"
        raise UserError(name, type(value).__name__, rule, TRL_ARGUMENTS[name])
