"""The block slurm: options of `orchestrator submit --to slurm`."""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.settings.base import FREE, Block, Positive
from orchestrator.settings.cluster import ClusterSpec
from orchestrator.settings.errors import UserError


class SlurmSpec(Block):
    """Options of `orchestrator submit --to slurm`; nodes, and GPUs and CPUs per node, follow from
    `cluster`.
    """

    workers_per_node: Positive | None = Field(None, json_schema_extra=FREE)
    """Workers per node; not needed with one worker, or with cluster.placement STRICT_PACK or
    STRICT_SPREAD.
    """
    time: str | None = Field(None, json_schema_extra=FREE)
    """Time limit of a start, after which the job is requeued: D-HH:MM:SS, HH:MM:SS or MM:SS, or a
    number of seconds (YAML reads 24:00:00 as one). The partition's limit when not set.
    """
    signal_s: Annotated[int, Field(ge=1, le=65535)] = Field(300, json_schema_extra=FREE)
    """Seconds before the time limit at which the run is signalled to save; Slurm may signal up to a
    minute earlier.
    """
    partition: str | None = Field(None, json_schema_extra=FREE)
    """Partition; the cluster's default when not set."""
    account: str | None = Field(None, json_schema_extra=FREE)
    """Account to charge; your default when not set."""
    qos: str | None = Field(None, json_schema_extra=FREE)
    """Quality of service; the default when not set."""
    args: list[str] = Field([], json_schema_extra=FREE)
    """Further flags of sbatch, for example [--mem=0, --exclusive]; they override the generated
    ones.
    """

    @field_validator("time", mode="before")
    @classmethod
    def _format_seconds(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value // 3600}:{value // 60 % 60:02}:{value % 60:02}"
        if value is not None and not re.fullmatch(
            r"\d+-\d+(:\d\d?){0,2}|\d+(:\d\d?){1,2}", str(value)
        ):
            raise PydanticCustomError(
                "time", "must be D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds"
            )
        return value

    @property
    def time_s(self) -> int | None:
        """Return the time limit in seconds."""
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        parts = [*parts, 0, 0][:3] if dash else [0, 0, *parts][-3:]
        return ((int(days or 0) * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]

    def check(self) -> None:
        """Check the time of the signal, and the further flags."""
        if self.time_s is not None and self.signal_s >= self.time_s:
            rule = f"is not less than slurm.time ({self.time}), so every start would be stopped at "
            cure = "lower it, or raise slurm.time"
            raise UserError("slurm.signal_s", self.signal_s, f"{rule}once", cure)
        for entry in self.args:
            if not entry.startswith("--"):
                rule = "is not a flag of the form --name or --name=value"
                raise UserError("slurm.args", entry, rule, "for example slurm.args=[--mem=0]")
            if entry.startswith("--export=") and entry.count("=") > 1:
                shown = "=".join(entry.split("=")[:2]) + "=..."
                rule = "would store the value in the run directory, readable by all"
                cure = "remove it, and set the variable where you submit: the job inherits that "
                raise UserError("slurm.args", shown, rule, f"{cure}environment")

    def check_cluster(self, cluster: ClusterSpec) -> None:
        """Check that the workers of a node agree with the placement of the workers.

        Raises:
            UserError: they do not.
        """
        key, count = "slurm.workers_per_node", self.workers_per_node
        cure = "remove it, or set cluster.placement=PACK"
        if count is None:
            return
        if cluster.placement == "STRICT_PACK" and count < cluster.max_workers:
            rule = f"cluster.placement STRICT_PACK needs all {cluster.max_workers} workers on one "
            raise UserError(key, count, f"{rule}node", cure)
        if cluster.placement == "STRICT_SPREAD" and count > 1:
            rule = "cluster.placement STRICT_SPREAD needs each worker on its own node"
            raise UserError(key, count, rule, cure)
