"""transformers' callback classes, imported without peft.

transformers.trainer_utils, which they need, imports peft for the sake of the Trainer, and peft
imports bitsandbytes and torch's compiler: of the 8 s of CPU that a process takes to import, 3 are
peft's. Here that import is skipped, and the two names that it binds answer isinstance as peft's
classes do: no instance exists before peft is imported.
"""

import sys
from typing import Any
from unittest import mock

from transformers.utils import import_utils


class _ImportedLater(type):
    """Type of a stand-in for the class of the same name in peft."""

    def __instancecheck__(cls, instance: Any) -> bool:
        peft = sys.modules.get("peft")
        return peft is not None and isinstance(instance, getattr(peft, cls.__name__))


class PeftModel(metaclass=_ImportedLater):
    """Stand-in for peft.PeftModel."""


class PeftMixedModel(metaclass=_ImportedLater):
    """Stand-in for peft.PeftMixedModel."""


if "transformers.trainer_utils" not in sys.modules:
    with mock.patch("transformers.utils.is_peft_available", return_value=False):
        import transformers.trainer_utils as trainer_utils
    trainer_utils.is_peft_available = import_utils.is_peft_available  # pyright: ignore
    trainer_utils.PeftModel = PeftModel  # pyright: ignore
    trainer_utils.PeftMixedModel = PeftMixedModel  # pyright: ignore

from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import ExportableState  # noqa: E402
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType  # noqa: E402

__all__ = [
    "EarlyStoppingCallback",
    "ExportableState",
    "IntervalStrategy",
    "SaveStrategy",
    "SchedulerType",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
]
