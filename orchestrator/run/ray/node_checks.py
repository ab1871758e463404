"""Check the nodes of a Ray cluster, each by an actor that runs the tests of a Probe there."""

import os
import time
from concurrent.futures import Future
from typing import Any

from orchestrator.run.checks import preflight
from orchestrator.run.checks.checks import DRIVER, SILENT
from orchestrator.run.checks.disk import space_checks
from orchestrator.run.checks.probe import Probe
from orchestrator.run.checks.report import Check, raise_failed
from orchestrator.run.ray import capacity
from orchestrator.run.ray.cluster import entered, is_joined
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec


def check_all_nodes(spec: RunSpec | None) -> list[Check]:
    """Check this machine and, if RAY_ADDRESS names a cluster, every node that could train.

    Raises:
        UserError: the cluster cannot be joined.
    """
    checks = space_checks(spec) if spec is not None else []
    if not is_joined():
        gpus = 0.0
        if spec is not None:  # without a cluster all workers are on this machine
            gpus = spec.cluster.resources.get("GPU", 0) * spec.cluster.min_workers
        return preflight.check_here(spec, gpus) + checks
    with entered(spec):
        if spec is not None:
            try:
                capacity.wait_for_capacity(spec, capacity.CLUSTER_WAIT_S)
            except UserError as small:
                checks.append(Check(small.key, "", str(small.value), small.rule, small.cure))
        return _check_nodes(spec, _usable_nodes(spec)) + checks


def check_new_nodes(spec: RunSpec, checked: set[str]) -> None:
    """Check the nodes whose IDs are not in `checked`, and add them.

    Raises:
        UserError: every failed check, one line each.
    """
    import ray

    if not spec.cluster.preflight:
        return
    nodes = [node for node in _usable_nodes(spec) if node["NodeID"] not in checked]
    is_first, began = not checked, time.monotonic()
    checked |= {node["NodeID"] for node in nodes}
    this_machine = {ray.get_runtime_context().get_node_id()}  # checked before Ray started
    if not nodes or checked <= this_machine:
        return
    # a node that is lost while an attempt dies must not end the run
    checks = _check_nodes(spec, nodes)
    raise_failed(check for check in checks if is_first or check.name != SILENT)
    print(f"nodes: {len(nodes)} checked in {time.monotonic() - began:.1f} s", flush=True)


def _usable_nodes(spec: RunSpec | None) -> list[dict[str, Any]]:
    """Return the live nodes that can hold a worker; without settings all live nodes."""
    needed = capacity.worker_resources(spec) if spec is not None else {}
    return [
        node
        for node in capacity.live_nodes()
        if all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
    ]


def _check_nodes(spec: RunSpec | None, nodes: list[dict[str, Any]]) -> list[Check]:
    """Run all checks on nodes and this process."""
    import ray

    total, free = (
        resources.get("GPU", 0)
        for resources in (ray.cluster_resources(), ray.available_resources())
    )
    use_gpu = capacity.worker_resources(spec).get("GPU", 0) > 0 if spec is not None else total > 0
    driver = preflight.this_process(f"{DRIVER} ({os.uname().nodename})")
    # Ray may count one machine as several nodes
    machines = {capacity.node_name(node): node for node in nodes}
    actors: list[Any] = []
    try:
        probed: list[preflight.Node] = []
        for name, node in machines.items():
            actors.append(_probe_on(node))
            probed.append(_probed_node(name, node, actors[-1], use_gpu))
        return preflight.check_nodes(driver, probed, spec, free == total, use_gpu)
    finally:
        for actor in actors:
            ray.kill(actor)


def _probe_on(node: dict[str, Any]) -> Any:
    """Start a Probe as an actor on a node.

    It has no resources, as other programs may hold all; such an actor sees every GPU of its node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    probe = ray.remote(Probe)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return probe.options(num_cpus=0, num_gpus=0, scheduling_strategy=there).remote()


def _probed_node(name: str, node: dict[str, Any], actor: Any, use_gpu: bool) -> preflight.Node:
    """Return a node whose Probe is an actor."""

    def call(method: str, *arguments: Any) -> "Future[Any]":
        return getattr(actor, method).remote(*arguments).future()

    gpus = node["Resources"].get("GPU", 0) if use_gpu else 0
    return preflight.Node(name, node["NodeManagerAddress"], gpus, call)
