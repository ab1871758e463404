"""The block evaluation: when to evaluate, and which metric decides what is best."""

import difflib
import re
from collections.abc import Sequence

from pydantic import Field

from orchestrator.settings.base import FREE, Block, NonNegative, Positive, check_user_code
from orchestrator.settings.data import DataSpec
from orchestrator.settings.errors import UserError

NEEDS_BEST = (
    "needs evaluation.metric_for_best, which decides what is better",
    "for example evaluation.metric_for_best=loss",
)
"""Rule and fix of a setting that depends on which evaluation is best."""


class EarlyStoppingSpec(Block):
    """Early stopping when evaluations no longer improve (transformers' EarlyStoppingCallback)."""

    patience: Positive
    """Consecutive evaluations without a better evaluation.metric_for_best after which training
    ends.
    """
    min_delta: float = Field(0.0, ge=0)
    """Minimum improvement: it must exceed this. In the units of the metric."""


class EvaluationSpec(Block):
    """Evaluation on data.eval: before the first step, at intervals, and after the last step."""

    every_steps: Positive | None = Field(None, json_schema_extra=FREE)
    """Optimizer steps between evaluations; no evaluation by steps when not set."""
    every_epoch: bool = Field(False, json_schema_extra=FREE)
    """Evaluate at the end of every epoch."""
    at_start: bool = Field(True, json_schema_extra=FREE)
    """Evaluate before the first step."""
    metric_for_best: str | None = None
    """Metric that decides which step was best (and early stopping), for example loss or
    rewards/accuracies; with several evaluation sets NAME_loss. The best step so far is saved and
    its checkpoint kept, except before the first step.
    """
    greater_is_better: bool | None = None
    """Direction of metric_for_best; when not set, false for names that end with loss and true
    otherwise.
    """
    compute_metrics: str | None = Field(None, json_schema_extra=FREE)
    """A user's function as module:attr, EvalPrediction -> {name: number}: additional metrics,
    reported with the prefix eval_. Rank zero passes it the Predictions of
    orchestrator/training/compute_metrics.py; the other ranks wait for at most
    cluster.collective_timeout_s.
    """
    logits: bool = Field(False, json_schema_extra=FREE)
    """Pass what TRL passes: logits and input_ids of padded sequences, for which the policy runs
    once more.
    """
    batch_eval_metrics: bool = Field(False, json_schema_extra=FREE)
    """Pass one batch at a time, as tensors; the last call has compute_result=True, and its result
    is used.
    """
    batch_size: Positive | None = Field(None, json_schema_extra=FREE)
    """Pairs per batch of logits or batch_eval_metrics; batch.micro_batch_size when not set, else 1.
    """
    samples: NonNegative = Field(0, json_schema_extra=FREE)
    """Prompts of the first evaluation set for which rank 0 generates answers at the end of the
    run, with the model before and after training, each whole on one device: greedily, 64 tokens at
    most.
    """
    early_stopping: EarlyStoppingSpec | None = Field(None, json_schema_extra=FREE)
    """Early stopping; none when not set."""

    @property
    def reported_best(self) -> str | None:
        """Return metric_for_best as evaluations report it."""
        return (
            None
            if self.metric_for_best is None
            else f"eval_{self.metric_for_best.removeprefix('eval_')}"
        )

    def check(self) -> None:
        """Check the settings that need another one."""
        stopping = self.early_stopping
        if stopping is not None and self.metric_for_best is None:
            raise UserError("evaluation.early_stopping", stopping.model_dump(), *NEEDS_BEST)
        if self.compute_metrics:
            check_user_code("evaluation.compute_metrics", self.compute_metrics)

    def check_data(self, data: DataSpec) -> None:
        """Check that there are evaluation pairs if they are needed, in sets with usable names.

        Raises:
            UserError: there are none, or a set has another name.
        """
        for key, value in self:
            if value != EvaluationSpec.model_fields[key].default and not data.eval_sets:
                cure = "set data.eval to a file of preference pairs, or data.eval_fraction=0.05"
                raise UserError(f"evaluation.{key}", value, "needs evaluation pairs", cure)
        for name in data.eval_sets:
            if name and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                rule = "cannot be part of a metric's name"
                raise UserError("data.eval", name, rule, "use letters, digits, _ and -")

    def check_metrics(
        self, eval_sets: list[str], evaluated: Sequence[str], has_more: bool = False
    ) -> None:
        """Check that no set has the name of a metric, and that metric_for_best is a metric.

        evaluated: metrics of an evaluation, without the prefix eval_ or eval_NAME_. has_more: a
        user's compute_metrics adds metrics, whose names are unknown before its call.

        Raises:
            UserError: a set has such a name, or no evaluation has that metric.
        """
        for name in eval_sets:
            if name in evaluated:
                raise UserError("data.eval", name, "is the name of a metric", "rename that set")
        if self.metric_for_best is None:
            return
        metrics = [f"{name}_{each}" if name else each for name in eval_sets for each in evaluated]
        bare = self.metric_for_best.removeprefix("eval_")
        if has_more and any(bare.startswith(f"{name}_" * bool(name)) for name in eval_sets):
            return
        if bare not in metrics:
            near = difflib.get_close_matches(bare, metrics, n=1)
            example = f"for example evaluation.metric_for_best={metrics[0]}"
            rule, cure = (
                "is not an evaluated metric",
                f"did you mean {near[0]}?" if near else example,
            )
            raise UserError("evaluation.metric_for_best", self.metric_for_best, rule, cure)
