"""The callbacks of a tiny run."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orchestrator.training.callbacks.handler import Callbacks
from orchestrator.training.callbacks.training_args import training_args
from orchestrator.training.rundir import RunDir
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec


def callbacks(folder: Path, *added: TrainerCallback, **objects: Any) -> Callbacks:
    spec = tiny_spec(folder)
    args = training_args(spec, RunDir(spec.run_dir), 4, 1.0, ALONE, "fp32")
    return Callbacks(list(added), args, objects)
