"""Check every node before training, each check when those before it have what it needs.

A `Node` has a function that returns a future, which may never be done: this module does not know
how nodes are reached.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from orchestrator.run.checks.checks import (
    bandwidth_checks,
    clock_checks,
    file_checks,
    folder_checks,
    gpu_checks,
    not_writable,
    port_checks,
    silence_checks,
    version_checks,
)
from orchestrator.run.checks.disk import local_sources, written_folders
from orchestrator.run.checks.parallel import in_thread, one_line, results_of
from orchestrator.run.checks.probe import (
    ALL_REDUCE_S,
    CONNECT_S,
    IMPORT_S,
    READ_S,
    SHARED_S,
    Facts,
    Probe,
)
from orchestrator.run.checks.report import Check
from orchestrator.settings.run import RunSpec

DEADLINE_S = 40.0  # seconds after which waiting for nodes ends
START_S = 25.0  # seconds for a node's first answer, which includes the start of its process
ANSWER_S = 5.0  # seconds for any other answer, besides the time of the task itself
PINGS = 5
FOLDER = ".preflight"  # prefix of the folder in which nodes write test files


class Node(NamedTuple):
    """A node, or the driver, that can run methods of Probe."""

    name: str  # empty if it is the only one
    address: str
    gpus: float  # how many it should have
    call: Callable[..., "Future[Any]"]  # (method of Probe, *arguments) -> future of the result


def this_process(name: str = "", gpus: float = 0) -> Node:
    """Return this process as a Node."""
    probe = Probe()

    def call(method: str, *arguments: Any) -> "Future[Any]":
        return in_thread(partial(getattr(probe, method), *arguments))

    return Node(name, "", gpus, call)


def check_here(spec: RunSpec | None, gpus: float = 0) -> list[Check]:
    """Check this machine, which should have so many GPUs; without settings, what needs none."""
    return check_nodes(this_process(gpus=gpus), [], spec)


def check_nodes(
    driver: Node,
    nodes: Sequence[Node],
    spec: RunSpec | None,
    gpus_idle: bool = True,
    use_gpu: bool = False,
) -> list[Check]:
    """Run all checks on all nodes; takes DEADLINE_S seconds at most, longer under load.

    driver: this process, which also writes the run directory. gpus_idle: Ray has assigned no GPU.
    use_gpu: ranks will communicate between GPUs.
    """
    group = _Group(driver, nodes)
    paths = local_sources(spec) if spec else {}
    facts: dict[str, Facts] = group.call("facts", lambda node: (paths, node.gpus > 0), START_S)
    checks = [*version_checks(facts, driver.name), *file_checks(facts, paths)]
    if spec is None or spec.cluster.resources.get("GPU", 0) or not spec.cluster.resources:
        checks += gpu_checks(facts, {node.name: node.gpus for node in nodes or [driver]}, gpus_idle)
    if spec is not None:
        checks += _check_folders(group, spec)
    if nodes:
        checks += clock_checks(_clock_offsets(group))
        ports = {name: of.ports for name, of in facts.items()}
        checks += port_checks(_unreached(group), ports)
    if len(nodes) > 1:
        if group.silent or not all(check.ok for check in checks):
            later = "not measured until the other checks pass"
            checks += [Check("all-reduce", node.name, later) for node in nodes]
        else:
            interface = spec.cluster.network_interface if spec else None
            checks += bandwidth_checks(_all_reduce_rates(group, interface, use_gpu))
    return checks + silence_checks(group.silent)


class _Group:
    """The driver and the nodes; those that have not answered once are not called again."""

    def __init__(self, driver: Node, nodes: Sequence[Node]) -> None:
        self.driver, self.everyone = driver, [driver, *nodes]
        self.there = list(self.everyone)
        self.silent: list[tuple[str, str, str]] = []  # (method, node, reason)
        # a busy but healthy machine imports torch several times slower
        self._slowness = max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))
        self._deadline = time.monotonic() + DEADLINE_S * self._slowness

    @property
    def nodes(self) -> list[Node]:
        """Return the nodes, without the driver, that have answered so far."""
        return [node for node in self.there if node is not self.driver]

    def call(
        self,
        method: str,
        arguments: Callable[[Node], tuple[Any, ...]],
        seconds: float,
        nodes: Sequence[Node] | None = None,
    ) -> dict[str, Any]:
        """Run a method of Probe on all nodes at once, or only on `nodes`.

        Returns {node: result} of those that answer within so many seconds.
        """
        targets = [node for node in self.there if nodes is None or node in nodes]
        left = max(0.0, min(seconds * self._slowness, self._deadline - time.monotonic()))
        futures = {node.name: node.call(method, *arguments(node)) for node in targets}
        results = results_of(futures, left)
        for node in targets:
            if isinstance(results[node.name], Exception):
                self.there.remove(node)
                self.silent.append((method, node.name, one_line(results.pop(node.name))))
        return results


def _check_folders(group: _Group, spec: RunSpec) -> list[Check]:
    """Check that all nodes see each other's files in the run's folders; remove the test files."""
    where, driver = written_folders(spec), group.driver
    folders = {key: folder / f"{FOLDER}-{token_hex(4)}" for key, folder in where.items()}
    created = group.call("make_folders", lambda _: (folders,), READ_S + ANSWER_S, [driver])
    if driver.name not in created:
        return []  # the driver did not answer, which silence_checks reports
    errors: dict[str, str] = created[driver.name]
    usable = {key: folder for key, folder in folders.items() if key not in errors}
    try:
        failed, unseen = _exchange_files(group, usable)
    finally:
        wait([driver.call("remove_folders", folders)], READ_S)
    unusable = [
        not_writable(key, where[key], driver.name, reason) for key, reason in errors.items()
    ]
    return unusable + folder_checks({key: where[key] for key in usable}, failed, unseen)


def _exchange_files(
    group: _Group, folders: dict[str, Path]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, list[str]]]]:
    """Write a file per node to each folder, then look for those of all nodes.

    Returns {node: {setting: why it could not write}} and {node: {setting: nodes whose files it does
    not see}}.
    """
    files = {node.name: f"node_{number}" for number, node in enumerate(group.everyone)}
    writers = {file: node for node, file in files.items()}
    seconds = SHARED_S + READ_S + ANSWER_S
    failed = group.call("write_files", lambda node: (folders, files[node.name]), seconds)
    names = {key: [files[node] for node in failed if key not in failed[node]] for key in folders}

    def arguments(node: Node) -> tuple[Any, ...]:
        written = {key: path for key, path in folders.items() if key not in failed[node.name]}
        return written, names

    unseen = group.call("unseen_files", arguments, seconds)
    return failed, {
        node: {key: [writers[file] for file in missing] for key, missing in of.items()}
        for node, of in unseen.items()
    }


def _clock_offsets(group: _Group) -> dict[str, tuple[float, float]]:
    """Return {node: (seconds by which its clock is ahead of the driver's, uncertainty)}."""
    offsets = {group.driver.name: (0.0, 0.0)}
    for node in group.nodes:
        pings: list[tuple[float, float]] = []
        for _ in range(PINGS):
            sent = time.time()
            times = group.call("now", lambda _: (), ANSWER_S, [node])
            received = time.time()
            pings += [((received - sent) / 2, at - (sent + received) / 2) for at in times.values()]
        if pings:
            unsure, offset = min(pings)
            offsets[node.name] = offset, unsure
    return offsets


def _unreached(group: _Group) -> dict[str, dict[str, str]]:
    """Return {node: {node that cannot connect to it: reason}}."""
    nodes = group.nodes
    ports = group.call("listen", lambda node: (node.address,), ANSWER_S, nodes)
    targets = {node.name: (node.address, ports[node.name]) for node in nodes if node.name in ports}

    def others(node: Node) -> tuple[Any, ...]:
        return ({target: at for target, at in targets.items() if target != node.name},)

    failed = group.call("connect", others, CONNECT_S + ANSWER_S, nodes)
    return {
        target: {source: errors[target] for source, errors in failed.items() if target in errors}
        for target in targets
    }


def _all_reduce_rates(group: _Group, interface: str | None, use_gpu: bool) -> dict[str, float]:
    """Return {node: bytes per second of an all-reduce between all nodes}."""
    nodes = group.nodes
    first, size = nodes[0], len(nodes)
    ranks = {node.name: rank for rank, node in enumerate(nodes)}

    def host(node: Node) -> tuple[Any, ...]:
        return node.address if node is first else None, size

    ports = group.call("open_store", host, IMPORT_S, nodes)
    if len(ports) < size:
        return {}
    store_at = first.address, ports[first.name]

    def arguments(node: Node) -> tuple[Any, ...]:
        towards = (nodes[1] if node is first else first).address
        return ranks[node.name], size, store_at, towards, interface, use_gpu

    return group.call("all_reduce", arguments, 2 * ALL_REDUCE_S, nodes)
