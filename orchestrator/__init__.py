"""Preference training for language models: one YAML, in a debugger, on Ray and on Slurm."""

import logging
from typing import TYPE_CHECKING, Any

# It logs a line per layer and pass, and one when transformers imports it, before any function of
# this package runs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = ["RunSpec", "UserError", "create_reference_model", "debug", "load_spec", "train"]

if TYPE_CHECKING:
    from orchestrator.models.build_reference import create_reference_model
    from orchestrator.run.local.debug import debug
    from orchestrator.run.ray.driver import train
    from orchestrator.settings.errors import UserError
    from orchestrator.settings.load import load_spec
    from orchestrator.settings.run import RunSpec

_HOMES = {
    "RunSpec": "orchestrator.settings.run",
    "UserError": "orchestrator.settings.errors",
    "create_reference_model": "orchestrator.models.build_reference",
    "debug": "orchestrator.run.local.debug",
    "load_spec": "orchestrator.settings.load",
    "train": "orchestrator.run.ray.driver",
}


def __getattr__(name: str) -> Any:  # lazy (PEP 562): loading settings must not import torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
