"""The block training: the length of training, and options of a step."""

from typing import Literal

from pydantic import Field

from orchestrator.settings.base import FREE, Block, Positive


class TrainingSpec(Block):
    """Length of training, and options of a step."""

    max_steps: Positive | None = None
    """Maximum optimizer steps; training ends earlier if its epochs end."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training pairs; 1 when neither this nor max_steps is set."""
    gradient_checkpointing: bool = Field(False, json_schema_extra=FREE)
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient to this L2 norm; no clipping when null."""
    on_non_finite: Literal["stop", "skip"] = Field("stop", json_schema_extra=FREE)
    """Response to a loss or gradient that is not finite: stop ends the run; skip continues with
    the next batch, without an update and without counting the step, up to 10 times in a row.
    """
    logging_steps: Positive = Field(10, json_schema_extra=FREE)
    """Optimizer steps between two logged lines."""
    token_metrics: bool = Field(True, json_schema_extra=FREE)
    """Also report metrics of the output head: entropy, logits/chosen, logits/rejected,
    mean_token_accuracy.
    """
    pair_ledger: bool = Field(True, json_schema_extra=FREE)
    """Record the results of every pair in every step in RUN_DIR/pairs.parquet, about 50 bytes per
    pair and step, for `orchestrator pairs`.
    """
