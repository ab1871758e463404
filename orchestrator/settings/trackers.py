"""The block wandb, and the names that the list of callbacks may have."""

import difflib
from typing import Literal

from pydantic import Field

from orchestrator.settings.base import FREE, Block, check_user_code
from orchestrator.settings.errors import UserError

TRACKERS: dict[str, str | None] = {
    "azure_ml": "azureml-sdk",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": None,
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
}
"""Trackers of transformers' report_to, and the package that each needs; W&B has its own settings
block.
"""


class WandbSpec(Block):
    """Weights & Biases."""

    project: str = Field("dpo-orchestrator", json_schema_extra=FREE)
    """W&B project of the run."""
    group: str | None = Field(None, json_schema_extra=FREE)
    """Group within the project."""
    mode: Literal["auto", "online", "offline", "disabled"] = Field("auto", json_schema_extra=FREE)
    """auto: online if a key is found, else offline files in RUN_DIR/wandb."""
    key_file: str | None = Field(None, json_schema_extra=FREE)
    """File with the API key, readable only by you (chmod 600), on the node of rank 0; when not
    set, W&B looks for a key in WANDB_API_KEY and in ~/.netrc.
    """


def check_callback(name: str) -> None:
    """Check that an entry of `callbacks` is a tracker or the user's code.

    Raises:
        UserError: it is neither.
    """
    if name in TRACKERS:
        return
    if name == "wandb":
        cure = "remove it here, and set wandb.mode=auto"
        raise UserError("callbacks", name, "W&B has its own settings block", cure)
    if near := difflib.get_close_matches(name, TRACKERS, n=1):
        raise UserError("callbacks", name, "is not a known tracker", f"did you mean {near[0]}?")
    check_user_code("callbacks", name)
