"""Find transformers' trackers by name; TensorBoard and MLflow write below RUN_DIR and continue on
resume.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
)

from orchestrator.callback_api import TrainerCallback
from orchestrator.settings.errors import UserError
from orchestrator.settings.trackers import TRACKERS
from orchestrator.training.rundir import RunDir

# module to import, if not the tracker's name
IMPORTED = {"azure_ml": "azureml", "flyte": "flytekit"}


class TensorBoard(TensorBoardCallback):
    """TensorBoard logs in RUN_DIR/logs/tensorboard, or in the folder TENSORBOARD_LOGGING_DIR.

    TensorBoard hides what a killed attempt wrote of steps that are repeated.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logging_dir = self.logging_dir or str(RunDir(Path(args.output_dir)).tensorboard)
        if self.tb_writer is None:
            # without a history the run starts over: even step 0 is repeated
            self.tb_writer = _writer()(
                self.logging_dir, purge_step=state.global_step + 1 if state.log_history else 0
            )
        super().on_train_begin(args, state, control, **kwargs)


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the writer only, which is installed with Ray
        from tensorboardX import SummaryWriter
    return SummaryWriter


class MLflow(MLflowCallback):
    """One MLflow run across resumes, in files below RUN_DIR/mlflow, or at MLFLOW_TRACKING_URI."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # store runs in files; a database needs more packages
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        super().__init__()

    def setup(self, args: Any, state: Any, model: Any) -> None:
        """Start or resume the run; on resume, log no parameters: MLflow has them, and rejects
        changed ones.
        """
        import mlflow

        folder = RunDir(Path(args.output_dir)).mlflow
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri((folder / "runs").as_uri())
        known = folder / "run_id"
        going_on = (
            {"MLFLOW_RUN_ID": known.read_text(), "MLFLOW_MAX_LOG_PARAMS": "0"}
            if known.is_file()
            else {}
        )
        before = {name: os.environ[name] for name in going_on if name in os.environ}
        os.environ.update(going_on)
        try:
            super().setup(args, state, model)
        finally:
            for name in going_on:
                os.environ.pop(name, None)  # MLflow removes the run's id itself
            os.environ.update(before)
        if (run := mlflow.active_run()) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            known.write_text(run.info.run_id)


OURS: dict[str, type[TrainerCallback]] = {"mlflow": MLflow, "tensorboard": TensorBoard}


def tracker(name: str) -> type[TrainerCallback]:
    """Return the class of a tracker.

    Raises:
        UserError: its package is not installed.
    """
    package = TRACKERS[name]
    modules = [IMPORTED.get(name, name), *["tensorboardX"] * (name == "tensorboard")]
    if package is not None and not any(importlib.util.find_spec(module) for module in modules):
        raise UserError("callbacks", name, "its package is not installed", f"pip install {package}")
    return OURS.get(name) or INTEGRATION_TO_CALLBACK[name]
