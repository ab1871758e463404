"""What a Python user hands over as functions and objects, instead of naming it in the settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import TrainerCallback

from orchestrator.data.collate import UserCollator
from orchestrator.engines.optim import Optimizers, check_functions
from orchestrator.models.reference import RefModel, check_function
from orchestrator.settings.spec import RunSpec, UserError

GivenCallback = TrainerCallback | type[TrainerCallback]
ComputeMetrics = Callable[[Any], Mapping[str, float]]


TRL_ARGUMENTS = {
    "model": "set model.path to its folder or hub name",
    "args": "write them as settings, by the names in docs/from-trl.md, and give load_spec(FILE)",
    "train_dataset": "save it with save_to_disk(FOLDER), and set data.train to that folder",
    "eval_dataset": "save it with save_to_disk(FOLDER), and set data.eval to that folder",
    "processing_class": "set model.tokenizer to its folder or hub name",
    "tokenizer": "set model.tokenizer to its folder or hub name",
    "peft_config": "set model.lora",
}
"""Arguments of TRL's DPOTrainer, and what to do instead."""


@dataclass(frozen=True)
class Given:
    """Each part that is not None stands in for what the settings say of it.

    Raises:
        UserError: a part is not of its kind.
    """

    ref_model: RefModel | None = None
    """policy -> reference, called on every rank."""
    optimizers: Optimizers | None = None
    """(params -> optimizer, optimizer -> schedule), called on every rank; where one is None the settings say. params
    are groups, dicts with "params" and "weight_decay": torch.optim.SGD(params, lr=1e-6) takes them as they are."""
    callbacks: Sequence[GivenCallback] | None = None
    """Fired on rank zero after those of the settings: objects, or classes that need no arguments."""
    compute_metrics: ComputeMetrics | None = None
    """Evaluated predictions -> more metrics of an evaluation."""
    data_collator: UserCollator | None = None
    """Rows -> TRL's input_ids, attention_mask, completion_mask, called on every rank; as data.collator."""

    def __post_init__(self) -> None:
        check_function(self.ref_model)
        check_functions(self.optimizers)
        if not isinstance(self.callbacks, list | tuple | None):
            raise UserError("callbacks", type(self.callbacks).__name__, "is no list", "give callbacks=[...]")
        for key in ("compute_metrics", "data_collator"):
            value = getattr(self, key)
            if not (value is None or callable(value)):
                raise UserError(key, type(value).__name__, "cannot be called", "give a function, or an object with one")

    @property
    def parts(self) -> dict[str, Any]:
        """What there is of it, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


NOTHING = Given()


def check_spec(spec: object) -> None:
    """Refuse the path of a file, or a dict, where settings belong.

    Raises:
        UserError: it is no RunSpec.
    """
    if not isinstance(spec, RunSpec):
        cure = "give load_spec(...) of the file or dict, which checks it"
        raise UserError("spec", spec, f"is {type(spec).__name__}, no RunSpec", cure)


def check_arguments(others: Mapping[str, object]) -> None:
    """Refuse keyword arguments that a function for users does not have.

    Raises:
        UserError: one of TRL's, which the settings name here.
        TypeError: any other.
    """
    for name, value in others.items():
        if name not in TRL_ARGUMENTS:
            raise TypeError(f"unexpected keyword argument {name!r}")
        rule = "is not an argument here: every rank loads it by the settings"
        raise UserError(name, type(value).__name__, rule, TRL_ARGUMENTS[name])
