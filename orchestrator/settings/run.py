"""All settings of a run: their blocks, the rules between blocks, and what may change on resume."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from orchestrator.settings.base import FREE, Block, UserCodeSpec
from orchestrator.settings.batch import BatchSpec
from orchestrator.settings.checkpoint import CheckpointSpec
from orchestrator.settings.cluster import ClusterSpec
from orchestrator.settings.data import DataSpec
from orchestrator.settings.deepspeed import contradictions
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.evaluation import EvaluationSpec
from orchestrator.settings.identity import IdentitySpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.model import ModelSpec
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec, check_optimizer
from orchestrator.settings.precision import Precision
from orchestrator.settings.reference import CacheMode, ReferenceSpec
from orchestrator.settings.slurm import SlurmSpec
from orchestrator.settings.trackers import WandbSpec, check_callback
from orchestrator.settings.training import TrainingSpec


class RunSpec(Block):
    """All settings of a run."""

    run: IdentitySpec
    """Name and folder of the run."""
    model: ModelSpec
    """The policy."""
    data: DataSpec
    """The preference pairs."""
    dpo: DpoSpec = DpoSpec()  # pyright: ignore[reportCallIssue]
    """The loss."""
    batch: BatchSpec
    """Pairs per step and per forward pass."""
    optimizer: OptimizerSpec = OptimizerSpec()  # pyright: ignore[reportCallIssue]
    """The optimizer."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """Learning-rate schedule."""
    training: TrainingSpec = TrainingSpec()  # pyright: ignore[reportCallIssue]
    """Length of training, and options of a step."""
    precision: Precision = "auto"
    """Type of the arithmetic, over fp32 weights: auto is bf16 if the GPU supports it, else fp32;
    tf32 is fp32 with matrix products in TF32 (GPUs from Ampere on), which is off for all others;
    fp64 is for tests.
    """
    engine: EngineSpec = EngineSpec()  # pyright: ignore[reportCallIssue]
    """Sharding of weights, gradients and optimizer state."""
    reference: ReferenceSpec = ReferenceSpec()  # pyright: ignore[reportCallIssue]
    """The frozen reference model."""
    callbacks: list[UserCodeSpec] = Field([], json_schema_extra=FREE)
    """Trackers by name (tensorboard, mlflow, ...) and your own transformers.TrainerCallback, as
    module:attr or {path, kwargs}.
    """
    evaluation: EvaluationSpec = EvaluationSpec()  # pyright: ignore[reportCallIssue]
    """When to evaluate."""
    checkpoint: CheckpointSpec = CheckpointSpec()  # pyright: ignore[reportCallIssue]
    """When to save, and how much to keep."""
    cluster: ClusterSpec = ClusterSpec()  # pyright: ignore[reportCallIssue]
    """Workers, resources and fault tolerance under Ray."""
    slurm: SlurmSpec = SlurmSpec()  # pyright: ignore[reportCallIssue]
    """Options of `submit --to slurm`."""
    wandb: WandbSpec = WandbSpec()  # pyright: ignore[reportCallIssue]
    """Weights & Biases."""

    @property
    def run_dir(self) -> Path:
        """Return the run directory, run.dir/run.name."""
        return Path(self.run.dir) / self.run.name

    @property
    def cache_dir(self) -> Path:
        """Return the folder of tokenised data and of models from model.init, shared between runs of
        one run.dir.
        """
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run.dir) / ".cache"

    @property
    def frozen_layers(self) -> int | None:
        """Return the number of lowest layers of the policy that are frozen."""
        return self.model.num_frozen_layers or self.reference.num_shared_layers

    @property
    def reference_cache(self) -> CacheMode:
        """Return the effective cache mode of reference log-probs: off if the reference is synced,
        or if a user's collator decides the tokens.
        """
        if self.reference.sync_every or self.data.collator:
            return "off"
        return "full" if self.reference.traits.is_precomputed else self.reference.cache

    @property
    def greater_is_better(self) -> bool:
        """Return the direction of evaluation.metric_for_best; by the rule of transformers if it is
        not set.
        """
        if self.evaluation.greater_is_better is not None:
            return self.evaluation.greater_is_better
        return not (self.evaluation.metric_for_best or "").endswith("loss")

    @model_validator(mode="after")
    def _check(self) -> "RunSpec":
        """Check the rules of each block, then those between blocks, before anything is loaded."""
        for _, block in self:
            if isinstance(block, Block):
                block.check()
        for entry in self.callbacks:
            check_callback(entry.path)
        self._check_models()
        self._check_rest()
        return self

    def _check_models(self) -> None:
        """Check losses, engine and reference against what they work on."""
        self.model.check_precision(self.precision)
        if self.data.collator is None:  # its rows are padded
            self.model.check_attention(self.precision)
        self.dpo.check_model_and_data(self.model, self.data)
        self.engine.check_model(self.model, self.precision)
        self.reference.check_model(self.model, self.precision)
        self.reference.check_engine(self.engine)
        self.reference.check_sync(self.model, self.engine, self.precision)
        if self.data.collator is not None:
            self.reference.check_collator("data.collator")

    def _check_rest(self) -> None:
        """Check the other rules between blocks."""
        check_optimizer("optimizer.name", self.optimizer.name, self.engine)
        for path, value, rule, cure in contradictions(self):
            raise UserError(f"engine.deepspeed_config.{path}", value, rule, cure)
        self.evaluation.check_data(self.data)
        self.checkpoint.check_evaluation(self.evaluation)
        self.cluster.check_optimizer(self.optimizer)
        self.slurm.check_cluster(self.cluster)


def changed_on_resume(before: RunSpec, after: RunSpec) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of each setting that differs but may not change on
    resume.
    """
    return list(_changes("", before, after))


def _changes(prefix: str, before: Block, after: Block) -> Iterator[tuple[str, Any, Any]]:
    for name, field in type(before).model_fields.items():
        old, new = getattr(before, name), getattr(after, name)
        if old == new or field.json_schema_extra == FREE:
            continue
        if isinstance(old, Block) and isinstance(new, Block):
            yield from _changes(f"{prefix}{name}.", old, new)
        else:
            yield f"{prefix}{name}", _shown(old), _shown(new)


def _shown(value: Any) -> Any:
    """Return a setting as a user would write it: blocks without defaults, and a block with only a
    path as the path.
    """
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _shown(entry) for name, entry in value.items()}
    plain = value.model_dump(exclude_defaults=True) if isinstance(value, Block) else value
    return plain["path"] if isinstance(value, Block) and plain.keys() == {"path"} else plain
