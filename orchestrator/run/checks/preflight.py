"""Check every node before training, and report each check with a fix if it fails.

This module does not use Ray. A `Node` has a function `ask` that returns a future, which may never
be done.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from orchestrator.run.checks.probe import (
    ALL_REDUCE_S,
    BANDWIDTH_BYTES,
    CONNECT_S,
    IMPORT_S,
    MISSING,
    NOT_SEEN,
    PACKAGES,
    READ_S,
    SHARED_S,
    Facts,
    Probe,
    answered,
    bytes_at,
    in_thread,
    one_line,
    side_by_side,
)
from orchestrator.settings.load import PATH_KEYS, SettingsError, looks_local, paths_in
from orchestrator.settings.optimizers import optimizer_kind
from orchestrator.settings.spec import RunSpec, UserError

DEADLINE_S = 40.0  # seconds after which waiting for nodes ends
START_S = 25.0  # seconds for a node's first answer, which includes the start of its process
ANSWER_S = 5.0  # seconds for any other answer, besides the time of the task itself
MAX_SKEW_S = 3.0  # seconds by which a clock may differ from the others
PINGS = 5
FULL = 2**20  # free bytes below which a run cannot start
BUSY = 0.1  # fraction of a GPU's memory that a driver and a desktop may use
DRIVER, SILENT = (
    "driver",
    "node",
)  # name of the driver process, and of the check that all nodes answer
FOLDER = ".preflight"  # prefix of the folder in which nodes write test files


@dataclass(frozen=True)
class Check:
    """Result of one check on one node."""

    name: str  # a setting ("run.dir"), a library, or a measured quantity
    node: str  # empty if there is only one machine
    found: str
    wrong: str = ""  # the problem; empty if there is none
    cure: str = ""

    @property
    def ok(self) -> bool:
        """Return whether the check passed."""
        return not self.wrong


def refusal(checks: Iterable[Check]) -> UserError | None:
    """Return an error with one line for each failed check; None if all passed."""
    errors = [
        UserError(
            f"{check.name} on {check.node}" if check.node else check.name,
            check.found,
            check.wrong,
            check.cure,
        )
        for check in merged(checks)
        if not check.ok
    ]
    return SettingsError(errors) if errors else None


def table(checks: Iterable[Check]) -> str:
    """Return a table with one line per distinct result, with the fix after a failure."""
    checks = merged(checks)
    rows = [
        ("ok" if check.ok else "RED", check.name, check.node or "here", check.found)
        for check in checks
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for check, row in zip(checks, rows, strict=True):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append(
            "  ".join(cells + ([] if check.ok else [f"{check.wrong}; {check.cure}"])).rstrip()
        )
    return "\n".join(lines)


def merged(checks: Iterable[Check]) -> list[Check]:
    """Merge checks that differ only in their node."""
    nodes: dict[Check, list[str]] = {}
    for check in checks:
        nodes.setdefault(replace(check, node=""), []).append(check.node)
    return [replace(check, node=listed(where)) for check, where in nodes.items()]


def listed(nodes: Iterable[str]) -> str:
    """Return the names of nodes as text, shortened if there are many."""
    names = list(dict.fromkeys(nodes))
    return (
        ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
    )


# --- asking all nodes -----------------------------------------------------------------------------


class Node(NamedTuple):
    """A node, or the driver, that can run methods of Probe."""

    name: str  # empty if it is the only one
    address: str
    gpus: float  # how many it should have
    ask: Callable[..., "Future[Any]"]  # (method of Probe, *arguments) -> future of the result


def this_process(name: str = "", gpus: float = 0) -> Node:
    """Return this process as a Node."""
    probe = Probe()
    return Node(
        name,
        "",
        gpus,
        lambda method, *arguments: in_thread(partial(getattr(probe, method), *arguments)),
    )


def look_here(spec: RunSpec | None, gpus: float = 0) -> list[Check]:
    """Check only this machine, which should have so many GPUs; without settings, only what needs
    none.
    """
    return look(this_process(gpus=gpus), [], spec)


def look(
    driver: Node,
    nodes: Sequence[Node],
    spec: RunSpec | None,
    gpus_idle: bool = True,
    use_gpu: bool = False,
) -> list[Check]:
    """Run all checks on all nodes; takes DEADLINE_S seconds at most, longer under load.

    driver: this process, which also writes the run directory. gpus_idle: whether Ray has assigned
    no GPU. use_gpu: whether ranks will communicate between GPUs.
    """
    asking = _Asking([driver, *nodes])
    paths = sources(spec) if spec else {}
    facts: dict[str, Facts] = asking.all("facts", lambda node: (paths, node.gpus > 0), START_S)
    checks = [*version_checks(facts, driver.name), *file_checks(facts, paths)]
    if spec is None or spec.cluster.resources.get("GPU", 0) or not spec.cluster.resources:
        checks += gpu_checks(facts, {node.name: node.gpus for node in nodes or [driver]}, gpus_idle)
    if spec is not None:
        checks += _look_at_folders(asking, driver, spec)
    if nodes:
        checks += clock_checks(_offsets(asking, driver))
        checks += port_checks(
            _unreached(asking, driver), {name: of.ports for name, of in facts.items()}
        )
    if len(nodes) > 1:
        if asking.silent or not all(check.ok for check in checks):
            checks += [
                Check("all-reduce", node.name, "not measured until the other checks pass")
                for node in nodes
            ]
        else:
            checks += bandwidth_checks(_rates(asking, driver, spec, use_gpu))
    return checks + silence_checks(asking.silent)


class _Asking:
    """Run a method on many nodes at once; nodes that have not answered are not asked again."""

    def __init__(self, everyone: Sequence[Node]) -> None:
        self.everyone, self.there = everyone, list(everyone)
        self.silent: list[tuple[str, str, str]] = []  # (method, node, why)
        # a busy but healthy machine imports torch several times slower
        self._slowness = max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))
        self._deadline = time.monotonic() + DEADLINE_S * self._slowness

    def all(
        self,
        method: str,
        arguments: Callable[[Node], tuple[Any, ...]],
        seconds: float,
        nodes: Sequence[Node] | None = None,
    ) -> dict[str, Any]:
        """Return {node: answer} of the nodes that answer within so many seconds; asks all, or only
        `nodes`.
        """
        targets = [node for node in self.there if nodes is None or node in nodes]
        left = max(0.0, min(seconds * self._slowness, self._deadline - time.monotonic()))
        answers = answered(
            {node.name: node.ask(method, *arguments(node)) for node in targets}, left
        )
        for node in targets:
            if isinstance(answers[node.name], Exception):
                self.there.remove(node)
                self.silent.append((method, node.name, one_line(answers.pop(node.name))))
        return answers


def _look_at_folders(asking: _Asking, driver: Node, spec: RunSpec) -> list[Check]:
    """Check that all nodes see each other's files in the run's folders.

    The test files are removed.
    """
    where = folders(spec)
    probes = {key: folder / f"{FOLDER}-{token_hex(4)}" for key, folder in where.items()}
    files = {node.name: f"node_{number}" for number, node in enumerate(asking.everyone)}
    errors = asking.all("make", lambda _: (probes,), READ_S + ANSWER_S, [driver]).get(driver.name)
    if errors is None:
        return []  # the driver did not answer, which silence_checks reports
    try:
        usable = {key: probe for key, probe in probes.items() if key not in errors}
        failed = asking.all(
            "leave", lambda node: (usable, files[node.name]), SHARED_S + READ_S + ANSWER_S
        )
        names = {key: [files[node] for node in failed if key not in failed[node]] for key in usable}

        def written(node: Node) -> dict[str, Path]:
            return {key: probe for key, probe in usable.items() if key not in failed[node.name]}

        unseen = asking.all(
            "find", lambda node: (written(node), names), SHARED_S + READ_S + ANSWER_S
        )
    finally:
        wait([driver.ask("clear", probes)], READ_S)
    by_file = {file: node for node, file in files.items()}
    missed = {
        node: {key: [by_file[f] for f in found] for key, found in of.items()}
        for node, of in unseen.items()
    }
    unmade = [
        Check(key, driver.name, str(where[key]), *_unwritable(key, why))
        for key, why in errors.items()
    ]
    return unmade + folder_checks({key: where[key] for key in usable}, failed, missed)


def _offsets(asking: _Asking, driver: Node) -> dict[str, tuple[float, float]]:
    """Return {node: (seconds by which its clock is ahead of the driver's, uncertainty)}."""
    offsets = {driver.name: (0.0, 0.0)}
    for node in [node for node in asking.there if node is not driver]:
        pings: list[tuple[float, float]] = []
        for _ in range(PINGS):
            sent = time.time()
            answer = asking.all("now", lambda _: (), ANSWER_S, [node])
            received = time.time()
            pings += [((received - sent) / 2, at - (sent + received) / 2) for at in answer.values()]
        if pings:
            unsure, offset = min(pings)
            offsets[node.name] = offset, unsure
    return offsets


def _unreached(asking: _Asking, driver: Node) -> dict[str, dict[str, str]]:
    """Return {node: {node that cannot connect to it: reason}}."""
    nodes = [node for node in asking.there if node is not driver]
    ports = asking.all("listen", lambda node: (node.address,), ANSWER_S, nodes)
    targets = {node.name: (node.address, ports[node.name]) for node in nodes if node.name in ports}
    tried = asking.all(
        "connect",
        lambda node: ({t: at for t, at in targets.items() if t != node.name},),
        CONNECT_S + ANSWER_S,
        nodes,
    )
    return {
        target: {source: failed[target] for source, failed in tried.items() if target in failed}
        for target in targets
    }


def _rates(asking: _Asking, driver: Node, spec: RunSpec | None, use_gpu: bool) -> dict[str, float]:
    """Return {node: bytes per second of an all-reduce between all nodes}."""
    nodes = [node for node in asking.there if node is not driver]
    first, size, rank = (
        nodes[0],
        len(nodes),
        {node.name: number for number, node in enumerate(nodes)},
    )
    met = asking.all(
        "meet", lambda node: (node.address if node is first else None, size), IMPORT_S, nodes
    )
    if len(met) < size:
        return {}
    meeting, interface = (
        (first.address, met[first.name]),
        spec.cluster.network_interface if spec else None,
    )

    def arguments(node: Node) -> tuple[Any, ...]:
        towards = (nodes[1] if node is first else first).address
        return rank[node.name], size, meeting, towards, interface, use_gpu

    return asking.all("all_reduce", arguments, 2 * ALL_REDUCE_S, nodes)


# --- results -> checks ----------------------------------------------------------------------------


def version_checks(facts: Mapping[str, Facts], driver: str = DRIVER) -> list[Check]:
    """Check for the same versions everywhere; the driver, which computes nothing, may have another
    build of torch.
    """
    checks: list[Check] = []
    for package in ("python", *PACKAGES):
        found = {node: of.versions[package] for node, of in facts.items()}
        usual = _usual(found[node] for node in sorted(found, key=lambda node: node == driver))
        for node, version in found.items():
            alike = node == driver and _public(version) == _public(usual)
            wrong = "" if version == usual or alike else f"the others have {usual}"
            checks.append(
                Check(
                    package,
                    node,
                    version,
                    wrong,
                    wrong and _installed_by(facts[node], package, usual),
                )
            )
    return checks


def _public(version: str) -> str:
    """Return a version without its build: 2.13.0 for 2.13.0+cu130."""
    return version.partition("+")[0]


def _usual(values: Iterable[Any]) -> Any:
    """Return the most common value; the first of several."""
    return Counter(values).most_common(1)[0][0]


def _installed_by(facts: Facts, package: str, version: str) -> str:
    """Return how to install a version on a node."""
    if package == "python":
        return f"start its Ray with Python {version}"
    if package == "dpo-orchestrator":
        return "install the same checkout there"
    if version == MISSING:
        return f"run {facts.python} -m pip uninstall {package} there"
    build = version.partition("+")[2] if package == "torch" else ""
    index = (
        f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    )  # index of such builds
    return (
        f"run {facts.python} -m pip install {package}=={version}{index} there, and restart its Ray"
    )


def gpu_checks(
    facts: Mapping[str, Facts], expected: Mapping[str, float], idle: bool
) -> list[Check]:
    """Check that torch can use the expected GPUs of each node and, if Ray is idle, that no other
    process uses them.
    """
    checks: list[Check] = []
    for node, of in facts.items():
        if node not in expected:
            continue
        gpus, wrong, cure = of.gpus, "", ""
        should = max(expected[node], len(gpus.cards))
        busy = [card for card in gpus.cards if card.used > BUSY * card.total]
        if gpus.to_torch < should:
            wrong = f"there should be {should:g} ({gpus.reason or 'the others are hidden'})"
            cure = _usable_by(of)
        elif busy and idle:
            used, total = _size(busy[0].used), _size(busy[0].total)
            wrong = f"another process uses {used} of {total} on a GPU that Ray considers free"
            cure = "end the processes that nvidia-smi shows there"
        cards = Counter(f"{card.name}, {_size(card.total)}" for card in gpus.cards).items()
        found = f"{gpus.to_torch} for torch" + "".join(
            f"; {count} x {card}" for card, count in cards
        )
        found += f" ({gpus.reason})" * bool(gpus.reason and not wrong)
        checks.append(Check("GPUs", node, found, wrong, cure))
    return checks


def _usable_by(facts: Facts) -> str:
    """Return how to make the GPUs of a node usable by torch."""
    if not facts.gpus.cards:
        elsewhere = "run on machines with GPUs (RAY_ADDRESS), or remove GPU from cluster.resources"
        return f"nvidia-smi shows no GPU there: fix its NVIDIA driver, {elsewhere}"
    if "compiled" in facts.gpus.reason:
        return (
            f"run {facts.python} -m pip install torch=={_public(facts.versions['torch'])} "
            "there, a build with CUDA"
        )
    if "too old" in facts.gpus.reason:
        return "update the NVIDIA driver there, or install a build of torch for its CUDA version"
    return f"start its Ray without CUDA_VISIBLE_DEVICES, or with --num-gpus={facts.gpus.to_torch}"


def file_checks(facts: Mapping[str, Facts], paths: Mapping[str, str]) -> list[Check]:
    """Check that all nodes can read the same files."""
    checks: list[Check] = []
    for key, path in paths.items():
        sizes = [size for of in facts.values() if isinstance(size := of.files[key], int)]
        for node, of in facts.items():
            found = of.files[key]
            if isinstance(found, UserError):
                checks.append(Check(key, node, path, found.rule, found.cure))
                continue
            usual, cure = (
                _usual(sizes),
                "copy the same files there, or to a file system shared by all nodes",
            )
            wrong = "" if found == usual else f"has {found} bytes there, but {usual} on the others"
            checks.append(Check(key, node, path, wrong, wrong and cure))
    return checks


def folder_checks(
    where: Mapping[str, Path],
    failed: Mapping[str, Mapping[str, str]],
    unseen: Mapping[str, Mapping[str, list[str]]],
) -> list[Check]:
    """Check that folders are shared by all nodes and writable.

    where: setting -> folder. failed: node -> setting -> why it could not write. unseen: node ->
    setting -> nodes whose files it does not see.
    """
    checks: list[Check] = []
    for key, folder in where.items():
        for node, failures in failed.items():
            missed = unseen.get(node, {}).get(key, [])
            wrong, cure = _unwritable(key, failures[key]) if key in failures else ("", "")
            if missed or failures.get(key) == NOT_SEEN:
                wrong = (
                    f"files written by {listed(missed) or 'the driver'} are not visible, so "
                    "it is not shared"
                )
                cure = (
                    f"mount the file system of {folder} there, or set {key} to a folder shared "
                    "by all nodes"
                )
            checks.append(Check(key, node, str(folder), wrong, cure))
    return checks


def _unwritable(key: str, why: str) -> tuple[str, str]:
    cure = (
        f"free some space, give the user who runs Ray write permission, or set {key} to "
        "another folder"
    )
    return f"cannot be written ({why})", cure


def clock_checks(offsets: Mapping[str, tuple[float, float]]) -> list[Check]:
    """Check that clocks agree. offsets: node -> (seconds ahead of the driver, uncertainty)."""
    ahead = [offset for offset, _ in offsets.values()]
    usual = max(ahead, key=lambda mine: sum(abs(mine - other) <= MAX_SKEW_S for other in ahead))
    checks: list[Check] = []
    for node, (offset, unsure) in offsets.items():
        skew = offset - usual
        if abs(skew) - unsure <= MAX_SKEW_S:
            checks.append(Check("clock", node, f"within {MAX_SKEW_S:g} s"))
            continue
        wrong = f"is {'ahead of' if skew > 0 else 'behind'} the other clocks"
        cure = "synchronise it with chrony or ntpd (chronyc makestep)"
        checks.append(Check("clock", node, f"{skew:+.1f} s", wrong, cure))
    return checks


def port_checks(
    unreached: Mapping[str, Mapping[str, str]], ranges: Mapping[str, tuple[int, int]]
) -> list[Check]:
    """Check that nodes reach each other.

    unreached: node -> {node that cannot connect: reason}; ranges: its ports.
    """
    checks: list[Check] = []
    for target, sources in unreached.items():
        ports, wrong, cure = "-".join(map(str, ranges[target])), "", ""
        if sources:
            wrong = f"cannot be reached from {listed(sources)} ({listed(sources.values())})"
            cure = (
                f"allow TCP to its ports {ports} (net.ipv4.ip_local_port_range) from the other "
                "nodes in its firewall"
            )
        checks.append(Check("ports", target, ports, wrong, cure))
    return checks


def bandwidth_checks(rates: Mapping[str, float]) -> list[Check]:
    """Report the bandwidth of an all-reduce, which passes if it finishes."""
    if not rates:
        return []
    rate = f"{_size(min(rates.values()))}/s, {_size(BANDWIDTH_BYTES)} over {len(rates)} nodes"
    return [Check("all-reduce", node, rate) for node in rates]


def silence_checks(silent: Iterable[tuple[str, str, str]]) -> list[Check]:
    """Return failed checks for nodes that did not answer. silent: (method, node, reason)."""
    checks: list[Check] = []
    for method, node, why in silent:
        if method in ("meet", "all_reduce"):
            cure = (
                "set cluster.network_interface to an interface through which the nodes reach "
                "each other"
            )
            checks.append(
                Check("all-reduce", node, why, "an all-reduce between the nodes fails", cure)
            )
        else:
            cure = (
                "check that it is up (ray status) and its Ray logs, or remove it from the cluster"
            )
            checks.append(Check(SILENT, node, why, f"could not be checked ({method})", cure))
    return checks


# --- paths and disk space of a run ----------------------------------------------------------------


def sources(spec: RunSpec) -> dict[str, str]:
    """Return {setting: path} of local files and folders that the run reads."""
    return {key: path for key, path in paths_in(spec, PATH_KEYS).items() if looks_local(path)}


def folders(spec: RunSpec) -> dict[str, Path]:
    """Return {setting: folder} of folders that every node writes."""
    shared = {"run.dir": spec.run_dir}
    if Path(spec.run.dir) not in spec.cache_dir.parents:
        shared["data.cache_dir"] = spec.cache_dir
    return shared


class DiskBudget(NamedTuple):
    """Bytes that a run writes, a lower bound if the optimizer's state is unknown."""

    checkpoint: int
    checkpoints: int  # maximum number at once
    model: int

    @property
    def total(self) -> int:
        """Return the total bytes."""
        return self.checkpoint * self.checkpoints + self.model


def disk_needed(spec: RunSpec, own_optimizer: bool = False) -> DiskBudget:
    """Return the bytes that a run writes, from the model's config and one optimizer step on a small
    matrix.

    own_optimizer: whether a user's function creates the optimizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.engines.precision import dtype_held
    from orchestrator.models.adapters import add_adapter
    from orchestrator.models.layers import freeze_lowest
    from orchestrator.models.loading import config_at

    init, lora = spec.model.init, spec.model.lora
    if init is not None:
        config = AutoConfig.for_model(
            init.model_type, **{"vocab_size": init.vocab_size, **init.config}
        )
    else:
        config = config_at("model.path", str(spec.model.path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora is not None and lora.adapter_path is None:
            add_adapter(model, lora, 0, torch.float32, True)
        elif spec.frozen_layers is not None:
            freeze_lowest(model, spec.frozen_layers, spec.model.tied_head == "untie")
    exported = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    saved = [p for name, p in model.named_parameters() if lora is None or ".lora_" in name]
    weight, state = (
        dtype_held(spec.precision).itemsize,
        0.0 if own_optimizer else _state_bytes(spec),
    )
    checkpoint = sum(p.numel() * (weight + state * p.requires_grad) for p in saved)
    every, steps, keeps_best = (
        spec.checkpoint.every_steps,
        spec.training.max_steps,
        spec.evaluation.metric_for_best,
    )
    at_once = (
        1
        if every is None and keeps_best is None
        else spec.checkpoint.keep + 1 + (keeps_best is not None)
    )
    if steps is not None:
        at_once = min(at_once, steps if keeps_best or every is None else -(-steps // every))
    return DiskBudget(int(checkpoint), at_once, 4 * exported)


def _state_bytes(spec: RunSpec) -> float:
    """Return the bytes of optimizer state per trainable element; 0 if unknown."""
    import torch

    from orchestrator.engines.optim import optimizer_factory
    from orchestrator.engines.precision import dtype_held

    if optimizer_kind(spec.optimizer.name) != "elementwise":
        return 0.0
    if spec.optimizer.compiles_kernels:
        return 8.0  # two fp32 moments; building the optimizer would compile it
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype_held(spec.precision)))
    p.grad = torch.zeros_like(p)
    optimizer = optimizer_factory(spec.optimizer)([{"params": [p], "weight_decay": 0.0}])
    optimizer.step()
    state = [
        value
        for value in optimizer.state[p].values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    return sum(value.nbytes for value in state) / p.numel()


def space_checks(spec: RunSpec, own_optimizer: bool = False) -> list[Check]:
    """Check for free space for what the run has still to write; own_optimizer: as in
    `disk_needed`.
    """
    where = folders(spec)
    asks: dict[str, Callable[[], Any]] = {
        key: partial(_free, folder) for key, folder in where.items()
    }
    asks["needed"] = partial(disk_needed, spec, own_optimizer)
    asks["held"] = partial(_bytes_below, [spec.run_dir / "checkpoints", spec.run_dir / "model"])
    found = side_by_side(asks, IMPORT_S)
    needed: DiskBudget | None = (
        found["needed"] if isinstance(found["needed"], DiskBudget) else None
    )  # other checks report the error
    more = (
        max(FULL, needed.total - found["held"])
        if needed and isinstance(found["held"], int)
        else FULL
    )
    checks: list[Check] = []
    for key, folder in where.items():
        if not isinstance(free := found[key], int):  # other checks report the error
            continue
        wants, why, less = (more if key == "run.dir" else FULL), "", ""
        if key == "run.dir" and needed:
            of = (
                f"{needed.checkpoints} of {_size(needed.checkpoint)} at once, and the model of "
                f"{_size(needed.model)}"
            )
            why, less = (
                f" for checkpoints ({of})",
                f", lower checkpoint.keep ({spec.checkpoint.keep})",
            )
        wrong = f"the run needs {_size(wants)} more in {folder}{why}"
        cure = f"free some space there{less}, or set {key} to another file system"
        lacks = free < wants
        name, has = f"space in {key}", f"{_size(free)} free, {_size(wants)} needed"
        checks.append(
            Check(name, "", f"{_size(free)} free" if lacks else has, wrong * lacks, cure * lacks)
        )
    return checks


def _free(folder: Path) -> int:
    """Return the free bytes at a folder, existing or not."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _bytes_below(folders: Iterable[Path]) -> int:
    return sum(
        path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()
    )


def _size(count: float) -> str:
    """Return bytes as text with a suitable unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_answers(spec: RunSpec) -> None:
    """Check that the file systems of a run respond and are not full.

    Raises:
        UserError: for the first setting whose file system does not.
    """
    paths = {**{key: str(folder) for key, folder in folders(spec).items()}, **sources(spec)}
    free: dict[str, Callable[[], Any]] = {
        key: partial(_free, folder) for key, folder in folders(spec).items()
    }
    read: dict[str, Callable[[], Any]] = {
        key: partial(bytes_at, key, path) for key, path in sources(spec).items()
    }
    for key, found in side_by_side({**free, **read}, READ_S).items():
        if isinstance(found, TimeoutError):
            cure = f"fix its file system, or set {key} to a path on another one"
            raise UserError(key, paths[key], f"cannot be read ({one_line(found)})", cure)
        if key in free and isinstance(found, int) and found < FULL:
            cure = f"free some space there, or set {key} to another file system"
            raise UserError(key, paths[key], "is on a file system that is full", cure)
