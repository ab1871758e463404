"""Count the workers that the nodes of a Ray cluster can hold, and wait for nodes to join."""

import time
from typing import Any

from orchestrator.run.checks.report import listed
from orchestrator.run.ray.cluster import is_joined, usable_cores
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir

POLL_S = 0.2
CLUSTER_WAIT_S = 10.0  # seconds in which an existing cluster may still grow to the required size


class StoppedWaiting(Exception):
    """Signal that the run was told to stop while it waited for room for its workers."""


def check_no_stop(run_dir: RunDir | None) -> None:
    """Check for the file STOP while waiting: there is no worker yet to notice it.

    Raises:
        StoppedWaiting: the file exists.
    """
    if run_dir is not None and run_dir.stop.exists():
        raise StoppedWaiting


def worker_resources(spec: RunSpec) -> dict[str, float]:
    """Return the resources of a worker; default: a GPU and a CPU if there are GPUs, else a CPU."""
    if spec.cluster.resources:
        return dict(spec.cluster.resources)
    import ray

    return {"GPU": 1, "CPU": 1} if ray.cluster_resources().get("GPU", 0) else {"CPU": 1}


def check_local_size(spec: RunSpec) -> None:
    """Check before Ray starts that the workers fit on this machine, unless a cluster is joined.

    Raises:
        UserError: they do not.
    """
    if is_joined():
        return
    resources = spec.cluster.resources
    cores, each = usable_cores(), resources.get("CPU", 0) if resources else 1
    if spec.cluster.min_workers * each > cores:
        rule = f"{each:g} CPU each, but this machine has {cores} CPUs"
        raise _too_small(spec, rule, int(cores // each))


def wait_for_capacity(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """Wait up to wait_s seconds for enough nodes; return how many workers they can hold.

    The current use of the nodes does not count.

    Raises:
        UserError: fewer than the run needs.
        StoppedWaiting: run_dir has the file STOP.
    """
    needed = worker_resources(spec)
    began, printed = time.monotonic(), False
    while True:
        nodes = live_nodes()
        fits = placeable([_held_by(node, needed) for node in nodes], spec.cluster.placement)
        if fits >= spec.cluster.min_workers:
            return fits
        if not is_joined() or time.monotonic() > began + wait_s:
            raise _cluster_too_small(spec, needed, nodes, fits)
        if not printed and time.monotonic() > began + CLUSTER_WAIT_S:
            printed = True
            held = f"the cluster can hold {counted(fits, 'worker')}"
            print(f"{held}; waiting {wait_s:g} s for a node to join", flush=True)
        check_no_stop(run_dir)
        time.sleep(0.5)


def _held_by(node: dict[str, Any], needed: dict[str, float]) -> int:
    """Return how many workers with the needed resources one node can hold."""
    has = node["Resources"]
    # 0.6 / 0.2 is a little less than 3, and 1 // 0.2 is 4
    return int(min(has.get(name, 0) / amount for name, amount in needed.items() if amount) + 1e-6)


def placeable(per_node: list[int], placement: str) -> int:
    """Return how many workers fit under a placement strategy of Ray.

    per_node: how many fit on each node.
    """
    if placement == "STRICT_PACK":
        return max(per_node, default=0)
    if placement == "STRICT_SPREAD":
        return sum(1 for fits in per_node if fits)
    return sum(per_node)


def _cluster_too_small(
    spec: RunSpec, needed: dict[str, float], nodes: list[dict[str, Any]], fits: int
) -> UserError:
    """Return the error of a cluster that cannot hold the workers, with what its nodes have."""
    names_by_amounts: dict[str, list[str]] = {}
    for node in nodes:
        amounts = ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in needed)
        names_by_amounts.setdefault(amounts, []).append(node_name(node))
    each = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    there = "; ".join(
        f"{amounts} on {listed(names)}" for amounts, names in names_by_amounts.items()
    )
    placed = f"{each} each, placed {spec.cluster.placement}"
    return _too_small(
        spec, f"{placed}, but the nodes of the cluster can hold {fits}: {there}", fits
    )


def _too_small(spec: RunSpec, rule: str, fits: int) -> UserError:
    cure = "lower cluster.resources, or join a larger cluster with RAY_ADDRESS"
    if fits:
        cure = f"set cluster.num_workers={fits}, {cure}"
    return UserError("cluster.num_workers", spec.cluster.num_workers, f"workers need {rule}", cure)


def live_nodes() -> list[dict[str, Any]]:
    """Return the live nodes of the cluster as described by Ray, sorted by address."""
    import ray

    alive = (node for node in ray.nodes() if node["Alive"])
    return sorted(alive, key=lambda node: node["NodeManagerAddress"])


def node_name(node: dict[str, Any]) -> str:
    """Return the address and the host name of a node."""
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
