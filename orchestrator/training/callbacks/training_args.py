"""Show the settings of a run to callbacks under the names of transformers' TrainingArguments."""

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from orchestrator.callback_api import (
    IntervalStrategy,
    SaveStrategy,
)
from orchestrator.settings.precision import Precision
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trackers import TRACKERS
from orchestrator.training.rundir import RunDir
from orchestrator.world import World


@dataclass(frozen=True)
class TrainingArgs:
    """The read-only `args` of callbacks, with the names of TrainingArguments (a real one would
    initialise devices).
    """

    output_dir: str
    run_name: str
    seed: int
    max_steps: int
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    max_grad_norm: float
    lr_scheduler_type: str
    optim: str
    bf16: bool
    fp16: bool
    tf32: bool
    gradient_checkpointing: bool
    max_length: int | None
    beta: float
    loss_type: str | list[str]
    logging_dir: str
    logging_steps: int
    eval_steps: int | None
    eval_on_start: bool
    eval_strategy: IntervalStrategy
    save_steps: int | None
    save_strategy: SaveStrategy
    save_total_limit: int
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    greater_is_better: bool | None
    report_to: tuple[str, ...]
    project: str
    resume_from_checkpoint: str | None
    logging_strategy: IntervalStrategy = IntervalStrategy.STEPS
    logging_first_step: bool = False
    eval_delay: float = 0
    disable_tqdm: bool = True
    push_to_hub: bool = False
    hub_private_repo: bool | None = None
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | None = None
    process_index: int = 0  # callbacks run on rank 0
    local_process_index: int = 0
    should_log: bool = True
    should_save: bool = True

    @property
    def train_batch_size(self) -> int:
        """Return the number of pairs in a forward pass on one rank."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Return the same number: evaluation has the same micro-batches."""
        return self.per_device_train_batch_size

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, like TrainingArguments.to_dict."""
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in asdict(self).items()
        }

    def to_json_string(self) -> str:
        """Return JSON, like TrainingArguments.to_json_string."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Return numbers and strings only, like TrainingArguments.to_sanitized_dict."""
        values = {
            **self.to_dict(),
            "train_batch_size": self.train_batch_size,
            "eval_batch_size": self.eval_batch_size,
        }
        plain = (bool, int, float, str)
        return {
            name: value if isinstance(value, plain) else str(value)
            for name, value in values.items()
        }


def training_args(
    spec: RunSpec,
    run_dir: RunDir,
    max_steps: int,
    epochs: float,
    world: World,
    precision: Precision,
    resumed_from: str | None = None,
) -> TrainingArgs:
    """Return the settings of a run under TrainingArguments' names."""
    micro = spec.batch.micro_batch_size or 1
    return TrainingArgs(
        output_dir=str(run_dir.path),
        run_name=spec.run.name,
        seed=spec.run.seed,
        max_steps=max_steps,
        num_train_epochs=epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=-(-spec.batch.global_batch_size // (micro * world.size)),
        world_size=world.size,
        learning_rate=spec.optimizer.lr,
        weight_decay=spec.optimizer.weight_decay,
        warmup_steps=spec.scheduler.warmup(max_steps),
        max_grad_norm=spec.training.max_grad_norm or 0.0,
        lr_scheduler_type=spec.scheduler.name,
        optim=spec.optimizer.name,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=precision == "tf32",
        gradient_checkpointing=spec.training.gradient_checkpointing,
        max_length=spec.data.max_length,
        beta=spec.dpo.beta,
        loss_type=spec.dpo.loss_type,
        logging_dir=str(run_dir.logs),
        logging_steps=spec.training.logging_steps,
        eval_steps=spec.evaluation.every_steps,
        eval_on_start=bool(spec.data.eval_sets) and spec.evaluation.at_start,
        eval_strategy=_eval_strategy(spec),
        save_steps=spec.checkpoint.every_steps,
        save_strategy=_save_strategy(spec),
        save_total_limit=spec.checkpoint.keep,
        load_best_model_at_end=spec.checkpoint.export == "best",
        metric_for_best_model=spec.evaluation.metric_for_best,
        greater_is_better=spec.greater_is_better if spec.evaluation.metric_for_best else None,
        report_to=_reports_to(spec),
        project=spec.wandb.project,
        resume_from_checkpoint=resumed_from,
    )


def _reports_to(spec: RunSpec) -> tuple[str, ...]:
    named = [entry.path for entry in spec.callbacks if entry.path in TRACKERS]
    return (*named, *["wandb"] * (spec.wandb.mode != "disabled"))


def _eval_strategy(spec: RunSpec) -> IntervalStrategy:
    """Return transformers' strategy, which is by epoch or by steps; if both are set, by steps.
    Without either, the evaluation after the last step counts as one by steps.
    """
    if not spec.data.eval_sets:
        return IntervalStrategy.NO
    by_epoch = spec.evaluation.every_epoch and spec.evaluation.every_steps is None
    return IntervalStrategy.EPOCH if by_epoch else IntervalStrategy.STEPS


def _save_strategy(spec: RunSpec) -> SaveStrategy:
    regular = spec.checkpoint.every is not None or spec.checkpoint.every_steps is not None
    by_steps = regular or spec.evaluation.metric_for_best is None
    return SaveStrategy.STEPS if by_steps else SaveStrategy.BEST
