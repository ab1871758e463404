"""The block checkpoint: when to save, what to keep, and which checkpoint is exported."""

from typing import Literal

from pydantic import Field

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.errors import UserError
from orchestrator.settings.evaluation import NEEDS_BEST, EvaluationSpec

Exported = Literal["last", "best"]


class CheckpointSpec(Block):
    """Checkpoints and the exported model."""

    every: Literal["auto"] | None = Field(None, json_schema_extra=FREE)
    """auto: choose the time between checkpoints from the measured cost of a save and the rate of
    failures (cluster.mtbf_hours); not together with every_steps.
    """
    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between checkpoints; only at the end when neither this nor every is set."""
    keep: Positive = Field(2, json_schema_extra=FREE)
    """Number of newest checkpoints to keep on disk; the best by evaluation.metric_for_best is also
    kept.
    """
    export: Exported = Field("last", json_schema_extra=FREE)
    """Which checkpoint becomes RUN_DIR/model: the last, or the best by evaluation.metric_for_best.
    """
    async_save: bool = Field(False, json_schema_extra=FREE)
    """Copy the state to host memory and write it in the background, while training continues."""

    def check(self) -> None:
        """Check that one setting decides how often to save.

        Raises:
            UserError: two do.
        """
        if self.every is not None and self.every_steps is not None:
            rule = f"cannot be combined with checkpoint.every_steps={self.every_steps}"
            raise UserError("checkpoint.every", self.every, rule, "remove one of them")

    def check_evaluation(self, evaluation: EvaluationSpec) -> None:
        """Check that an evaluation decides which checkpoint is best, if the best is exported.

        Raises:
            UserError: none does.
        """
        if self.export == "best" and evaluation.metric_for_best is None:
            raise UserError("checkpoint.export", self.export, *NEEDS_BEST)
