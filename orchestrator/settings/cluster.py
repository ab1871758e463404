"""The block cluster: workers, resources and fault tolerance under Ray."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.settings.base import FREE, MOST, Block, NonNegative, Positive
from orchestrator.settings.errors import UserError
from orchestrator.settings.optim import OptimizerSpec

# Common names of Ray's built-in resources, in lower case; any other name is a custom resource of
# the cluster.
RAY_NAMES = {
    "gpu": "GPU",
    "gpus": "GPU",
    "num_gpus": "GPU",
    "cpu": "CPU",
    "cpus": "CPU",
    "num_cpus": "CPU",
}


class ClusterSpec(Block):
    """Workers, resources and fault tolerance under Ray."""

    num_workers: int | list[int] = Field(1, json_schema_extra=FREE)
    """Number of ranks, one worker each. [fewest, most]: as many as fit when the run starts or
    resumes; when room is added (in an existing cluster, placed PACK or SPREAD), the run saves and
    resumes with more.
    """
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field({}, json_schema_extra=FREE)
    """Resources of one worker, for example {CPU: 4, GPU: 1}; when empty, one GPU if there is any,
    else one CPU.
    """
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", json_schema_extra=FREE
    )
    """Ray's placement strategy for the workers."""
    storage_path: str | None = Field(None, json_schema_extra=FREE)
    """Folder for Ray Train's own records; RUN_DIR/logs/ray when not set.

    It never contains checkpoints.
    """
    max_failures: NonNegative = Field(3, json_schema_extra=FREE)
    """How often the run resumes after a worker dies, counted since the last new checkpoint; 0:
    never.
    """
    mtbf_hours: Annotated[float, Field(gt=0, le=MOST)] = Field(1000.0, json_schema_extra=FREE)
    """Mean hours between failures of one node, which checkpoint.every=auto assumes at first; hours
    and failures of the run's own attempts are added to it.
    """
    auth: Literal["token", "disabled"] = Field("token", json_schema_extra=FREE)
    """Authentication of a Ray cluster that the run starts (RAY_AUTH_MODE); an existing cluster has
    its own.
    """
    collective_timeout_s: Positive = Field(600, json_schema_extra=FREE)
    """Seconds that a rank waits for the others in a collective before the attempt is aborted and
    resumed.
    """
    hang_timeout_s: NonNegative = Field(300, json_schema_extra=FREE)
    """Seconds without progress after which a rank hangs: all ranks write their stacks to
    RUN_DIR/logs, a line names it, and the attempt is aborted and resumed. Longer in phases that
    take longer, while the process computes, and if the run was that slow before; 0: never.
    """
    preflight: bool = Field(True, json_schema_extra=FREE)
    """Check every node first, as `orchestrator doctor` does, and do not train if a check fails."""
    network_interface: str | None = Field(None, json_schema_extra=FREE)
    """Network interface for collectives, for example ib0; when not set, GLOO_SOCKET_IFNAME and
    NCCL_SOCKET_IFNAME of each node, else the interface through which the node reaches the cluster's
    head.
    """
    replacement_wait_s: NonNegative = Field(600, json_schema_extra=FREE)
    """Seconds to wait for a replacement after a node is lost, if the remaining nodes cannot hold
    the workers.
    """

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        is_range = isinstance(value, list | tuple)
        ends = [
            int(end) if str(end).isdecimal() else 0 for end in (value if is_range else [value] * 2)
        ]
        if len(ends) != 2 or not 1 <= ends[0] <= ends[1]:
            raise PydanticCustomError(
                "workers", "must be an integer of 1 or more, or [fewest, most]"
            )
        return ends if is_range else ends[0]

    @property
    def min_workers(self) -> int:
        """Return the fewest workers with which the run continues."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the most workers that the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def check(self) -> None:
        """Check that a worker requests known resources, and at least one."""
        for name, amount in self.resources.items():
            if (ray_name := RAY_NAMES.get(name.lower(), name)) != name:
                key, rule = f"cluster.resources.{name}", "is not the name of a Ray resource"
                cure = f"did you mean cluster.resources.{ray_name}={amount:g}?"
                raise UserError(key, amount, rule, cure)
        if self.resources and not any(self.resources.values()):
            rule = "requests no resources, so the number of workers would be unbounded"
            raise UserError("cluster.resources", self.resources, rule, "for example {CPU: 1}")

    def check_optimizer(self, optimizer: OptimizerSpec) -> None:
        """Check that the optimizer's state can be resumed on every allowed number of ranks.

        Raises:
            UserError: it cannot.
        """
        if self.min_workers < self.max_workers and not optimizer.is_elementwise:
            rule = f"the state of {optimizer.name} is not elementwise, so it can be resumed only "
            cure = f"set cluster.num_workers={self.max_workers}, or use torch.optim.AdamW"
            key, value = "cluster.num_workers", self.num_workers
            raise UserError(key, value, f"{rule}on the same number of ranks", cure)
