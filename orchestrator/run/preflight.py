"""Every node looked at before training: what a node finds, and what that means as checks with a cure beside each.

Nothing here knows Ray. A node is somebody who can be asked (`Node.ask`) and answers later, or never.
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

from orchestrator.run.probe import (
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

DEADLINE_S = 40.0  # seconds after which no node is waited for any more
START_S = 25.0  # seconds that a node has for its first answer, before which its process must start
ANSWER_S = 5.0  # seconds that it has for any other, beside what the errand itself may take
MAX_SKEW_S = 3.0  # seconds by which a clock may differ from the others
PINGS = 5
FULL = 2**20  # bytes free below which nothing can be begun
BUSY = 0.1  # part of a GPU's memory that a driver and a desktop may hold
DRIVER, SILENT = "driver", "node"  # the name of the process that asks, and of the check that all have answered
FOLDER = ".preflight"  # how the folder begins in which nodes leave their files


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on one node."""

    name: str  # a setting ("run.dir"), a library, or what was measured
    node: str  # where; empty where there is one machine alone
    found: str
    wrong: str = ""  # what is wrong with it; empty where nothing is
    cure: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


def refusal(checks: Iterable[Check]) -> UserError | None:
    """Everything that is wrong, a line each; None where nothing is."""
    errors = [
        UserError(f"{check.name} on {check.node}" if check.node else check.name, check.found, check.wrong, check.cure)
        for check in merged(checks)
        if not check.ok
    ]
    return SettingsError(errors) if errors else None


def table(checks: Iterable[Check]) -> str:
    """A line for each thing that nodes have found alike, with the cure beside what is wrong."""
    checks = merged(checks)
    rows = [("ok" if check.ok else "RED", check.name, check.node or "here", check.found) for check in checks]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for check, row in zip(checks, rows, strict=True):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells + ([] if check.ok else [f"{check.wrong}; {check.cure}"])).rstrip())
    return "\n".join(lines)


def merged(checks: Iterable[Check]) -> list[Check]:
    """The same checks; those that differ in their node alone are one."""
    nodes: dict[Check, list[str]] = {}
    for check in checks:
        nodes.setdefault(replace(check, node=""), []).append(check.node)
    return [replace(check, node=listed(where)) for check, where in nodes.items()]


def listed(nodes: Iterable[str]) -> str:
    """Names of nodes, without end where there are many."""
    names = list(dict.fromkeys(nodes))
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


# --- asking all of them ------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """Somebody to ask."""

    name: str  # empty where there is one alone
    address: str
    gpus: float  # how many it should have
    ask: Callable[..., "Future[Any]"]  # (method of Probe, *its arguments) -> the answer to come


def this_process(name: str = "", gpus: float = 0) -> Node:
    """The one that asks, as one that is asked."""
    probe = Probe()
    return Node(name, "", gpus, lambda method, *given: in_thread(partial(getattr(probe, method), *given)))


def look_here(spec: RunSpec | None, gpus: float = 0) -> list[Check]:
    """Look at this machine alone, which should have so many GPUs; without settings at what needs none."""
    return look(this_process(gpus=gpus), [], spec)


def look(
    driver: Node, nodes: Sequence[Node], spec: RunSpec | None, gpus_idle: bool = True, use_gpu: bool = False
) -> list[Check]:
    """Have all of them look at themselves and at each other; it takes DEADLINE_S seconds at most, longer under load.

    driver: this process, which writes the run directory as well. gpus_idle: whether Ray has given no GPU to anybody.
    use_gpu: whether ranks will talk from GPU to GPU.
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
        checks += port_checks(_unreached(asking, driver), {name: said.ports for name, said in facts.items()})
    if len(nodes) > 1:
        if asking.silent or not all(check.ok for check in checks):
            checks += [Check("all-reduce", node.name, "not measured before the rest is mended") for node in nodes]
        else:
            checks += bandwidth_checks(_rates(asking, driver, spec, use_gpu))
    return checks + silence_checks(asking.silent)


class _Asking:
    """Asks many at once; who has not answered is asked no more."""

    def __init__(self, everyone: Sequence[Node]) -> None:
        self.everyone, self.there = everyone, list(everyone)
        self.silent: list[tuple[str, str, str]] = []  # (method, node, why)
        # a busy machine imports torch several times slower, and is healthy
        self._slowness = max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))
        self._deadline = time.monotonic() + DEADLINE_S * self._slowness

    def all(
        self,
        method: str,
        arguments: Callable[[Node], tuple[Any, ...]],
        seconds: float,
        nodes: Sequence[Node] | None = None,
    ) -> dict[str, Any]:
        """Node -> answer, of those that have answered within so many seconds; all are asked, or these nodes."""
        asked = [node for node in self.there if nodes is None or node in nodes]
        left = max(0.0, min(seconds * self._slowness, self._deadline - time.monotonic()))
        answers = answered({node.name: node.ask(method, *arguments(node)) for node in asked}, left)
        for node in asked:
            if isinstance(answers[node.name], Exception):
                self.there.remove(node)
                self.silent.append((method, node.name, one_line(answers.pop(node.name))))
        return answers


def _look_at_folders(asking: _Asking, driver: Node, spec: RunSpec) -> list[Check]:
    """Whether what each node writes is seen by all. It leaves nothing behind."""
    where = folders(spec)
    probes = {key: folder / f"{FOLDER}-{token_hex(4)}" for key, folder in where.items()}
    files = {node.name: f"node_{number}" for number, node in enumerate(asking.everyone)}
    made = asking.all("make", lambda _: (probes,), READ_S + ANSWER_S, [driver]).get(driver.name)
    if made is None:
        return []  # it is silent, which is said elsewhere
    try:
        usable = {key: probe for key, probe in probes.items() if key not in made}
        failed = asking.all("leave", lambda node: (usable, files[node.name]), SHARED_S + READ_S + ANSWER_S)
        names = {key: [files[node] for node in failed if key not in failed[node]] for key in usable}

        def written(node: Node) -> dict[str, Path]:
            return {key: probe for key, probe in usable.items() if key not in failed[node.name]}

        unseen = asking.all("find", lambda node: (written(node), names), SHARED_S + READ_S + ANSWER_S)
    finally:
        wait([driver.ask("clear", probes)], READ_S)
    by_file = {file: node for node, file in files.items()}
    missed = {node: {key: [by_file[f] for f in found] for key, found in of.items()} for node, of in unseen.items()}
    unmade = [Check(key, driver.name, str(where[key]), *_unwritable(key, why)) for key, why in made.items()]
    return unmade + folder_checks({key: where[key] for key in usable}, failed, missed)


def _offsets(asking: _Asking, driver: Node) -> dict[str, tuple[float, float]]:
    """Node -> seconds by which its clock is ahead of the driver's, and how sure that is."""
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
    """Node -> the nodes that do not get through to it, and why."""
    nodes = [node for node in asking.there if node is not driver]
    ports = asking.all("listen", lambda node: (node.address,), ANSWER_S, nodes)
    targets = {node.name: (node.address, ports[node.name]) for node in nodes if node.name in ports}
    tried = asking.all(
        "connect", lambda node: ({t: at for t, at in targets.items() if t != node.name},), CONNECT_S + ANSWER_S, nodes
    )
    return {
        target: {source: failed[target] for source, failed in tried.items() if target in failed} for target in targets
    }


def _rates(asking: _Asking, driver: Node, spec: RunSpec | None, use_gpu: bool) -> dict[str, float]:
    """Node -> bytes a second of an all-reduce between all nodes."""
    nodes = [node for node in asking.there if node is not driver]
    first, size, rank = nodes[0], len(nodes), {node.name: number for number, node in enumerate(nodes)}
    met = asking.all("meet", lambda node: (node.address if node is first else None, size), IMPORT_S, nodes)
    if len(met) < size:
        return {}
    meeting, interface = (first.address, met[first.name]), spec.cluster.network_interface if spec else None

    def arguments(node: Node) -> tuple[Any, ...]:
        towards = (nodes[1] if node is first else first).address
        return rank[node.name], size, meeting, towards, interface, use_gpu

    return asking.all("all_reduce", arguments, 2 * ALL_REDUCE_S, nodes)


# --- what it means -----------------------------------------------------------------------------------------------


def version_checks(facts: Mapping[str, Facts], driver: str = DRIVER) -> list[Check]:
    """One version everywhere; of torch the driver, which computes nothing, may have another build."""
    checks: list[Check] = []
    for package in ("python", *PACKAGES):
        found = {node: said.versions[package] for node, said in facts.items()}
        usual = _usual(found[node] for node in sorted(found, key=lambda node: node == driver))
        for node, version in found.items():
            alike = node == driver and _public(version) == _public(usual)
            wrong = "" if version == usual or alike else f"the others have {usual}"
            checks.append(Check(package, node, version, wrong, wrong and _installed_by(facts[node], package, usual)))
    return checks


def _public(version: str) -> str:
    """Without the build: 2.13.0 of 2.13.0+cu130."""
    return version.partition("+")[0]


def _usual(values: Iterable[Any]) -> Any:
    """What most have; the first of them where it is a draw."""
    return Counter(values).most_common(1)[0][0]


def _installed_by(said: Facts, package: str, version: str) -> str:
    """How to give a node that version."""
    if package == "python":
        return f"start its Ray by Python {version}"
    if package == "dpo-orchestrator":
        return "install the same checkout there"
    if version == MISSING:
        return f"run {said.python} -m pip uninstall {package} there"
    build = version.partition("+")[2] if package == "torch" else ""
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""  # where such builds are
    return f"run {said.python} -m pip install {package}=={version}{index} there, and start its Ray again"


def gpu_checks(facts: Mapping[str, Facts], expected: Mapping[str, float], idle: bool) -> list[Check]:
    """GPUs that torch can use, as many as there should be on each node, and, where Ray is idle, nobody else on them."""
    checks: list[Check] = []
    for node, said in facts.items():
        if node not in expected:
            continue
        gpus, wrong, cure = said.gpus, "", ""
        should = max(expected[node], len(gpus.cards))
        busy = [card for card in gpus.cards if card.used > BUSY * card.total]
        if gpus.to_torch < should:
            wrong = f"there should be {should:g} ({gpus.reason or 'the rest is hidden'})"
            cure = _usable_by(said)
        elif busy and idle:
            wrong = f"others use {_size(busy[0].used)} of {_size(busy[0].total)} of a GPU that Ray has given to nobody"
            cure = "end the processes that nvidia-smi shows there"
        cards = Counter(f"{card.name}, {_size(card.total)}" for card in gpus.cards).items()
        found = f"{gpus.to_torch} for torch" + "".join(f"; {count} x {card}" for card, count in cards)
        found += f" ({gpus.reason})" * bool(gpus.reason and not wrong)
        checks.append(Check("GPUs", node, found, wrong, cure))
    return checks


def _usable_by(said: Facts) -> str:
    """How to give torch the GPUs of a node."""
    if not said.gpus.cards:
        elsewhere = "run where there are some (RAY_ADDRESS), or remove GPU from cluster.resources"
        return f"nvidia-smi shows no GPU there: fix its NVIDIA driver, {elsewhere}"
    if "compiled" in said.gpus.reason:
        return f"run {said.python} -m pip install torch=={_public(said.versions['torch'])} there, a build with CUDA"
    if "too old" in said.gpus.reason:
        return "update the NVIDIA driver there, or install the build of torch for its CUDA"
    return f"start its Ray without CUDA_VISIBLE_DEVICES, or with --num-gpus={said.gpus.to_torch}"


def file_checks(facts: Mapping[str, Facts], paths: Mapping[str, str]) -> list[Check]:
    """Files that all nodes can read, and the same ones."""
    checks: list[Check] = []
    for key, path in paths.items():
        sizes = [size for said in facts.values() if isinstance(size := said.files[key], int)]
        for node, said in facts.items():
            found = said.files[key]
            if isinstance(found, UserError):
                checks.append(Check(key, node, path, found.rule, found.cure))
                continue
            usual, cure = _usual(sizes), "copy the same files there, or to a file system that every node shares"
            wrong = "" if found == usual else f"has {found} bytes there, and {usual} on the others"
            checks.append(Check(key, node, path, wrong, wrong and cure))
    return checks


def folder_checks(
    where: Mapping[str, Path], failed: Mapping[str, Mapping[str, str]], unseen: Mapping[str, Mapping[str, list[str]]]
) -> list[Check]:
    """Folders that are the same on every node, and can be written.

    where: setting -> folder. failed: node -> setting -> why it could write nothing. unseen: node -> setting -> nodes of
    which it does not see what they have written.
    """
    checks: list[Check] = []
    for key, folder in where.items():
        for node, failures in failed.items():
            missed = unseen.get(node, {}).get(key, [])
            wrong, cure = _unwritable(key, failures[key]) if key in failures else ("", "")
            if missed or failures.get(key) == NOT_SEEN:
                wrong = f"what {listed(missed) or 'the driver'} writes there is not seen, so it is not shared"
                cure = f"mount the file system of {folder} there, or set {key} to a folder that every node shares"
            checks.append(Check(key, node, str(folder), wrong, cure))
    return checks


def _unwritable(key: str, why: str) -> tuple[str, str]:
    cure = f"free some space, let the user who runs Ray write there, or set {key} to another folder"
    return f"cannot be written ({why})", cure


def clock_checks(offsets: Mapping[str, tuple[float, float]]) -> list[Check]:
    """Clocks that agree. offsets: node -> seconds ahead of the driver, and by how much that may be off."""
    ahead = [offset for offset, _ in offsets.values()]
    usual = max(ahead, key=lambda mine: sum(abs(mine - other) <= MAX_SKEW_S for other in ahead))
    checks: list[Check] = []
    for node, (offset, unsure) in offsets.items():
        skew = offset - usual
        if abs(skew) - unsure <= MAX_SKEW_S:
            checks.append(Check("clock", node, f"within {MAX_SKEW_S:g} s"))
            continue
        wrong = f"is {'ahead of' if skew > 0 else 'behind'} the other clocks"
        cure = "let chrony or ntpd set it there (chronyc makestep)"
        checks.append(Check("clock", node, f"{skew:+.1f} s", wrong, cure))
    return checks


def port_checks(unreached: Mapping[str, Mapping[str, str]], ranges: Mapping[str, tuple[int, int]]) -> list[Check]:
    """Nodes that reach one another. unreached: node -> those that do not get through, and why; ranges: its ports."""
    checks: list[Check] = []
    for target, sources in unreached.items():
        ports, wrong, cure = "-".join(map(str, ranges[target])), "", ""
        if sources:
            wrong = f"cannot be reached from {listed(sources)} ({listed(sources.values())})"
            cure = f"let its firewall accept TCP to ports {ports} (net.ipv4.ip_local_port_range) from the other nodes"
        checks.append(Check("ports", target, ports, wrong, cure))
    return checks


def bandwidth_checks(rates: Mapping[str, float]) -> list[Check]:
    """What an all-reduce has moved; that it ends is all that is asked of it."""
    if not rates:
        return []
    rate = f"{_size(min(rates.values()))}/s, {_size(BANDWIDTH_BYTES)} over {len(rates)} nodes"
    return [Check("all-reduce", node, rate) for node in rates]


def silence_checks(silent: Iterable[tuple[str, str, str]]) -> list[Check]:
    """Nodes that have not answered, or not as they should: (what they were asked, node, why)."""
    checks: list[Check] = []
    for method, node, why in silent:
        if method in ("meet", "all_reduce"):
            cure = "set cluster.network_interface to one by which the nodes reach each other"
            checks.append(Check("all-reduce", node, why, "tensors cannot be added up over the nodes", cure))
        else:
            cure = "see whether it is up (ray status), and Ray's logs there, or take it out of the cluster"
            checks.append(Check(SILENT, node, why, f"could not be looked at ({method})", cure))
    return checks


# --- what the settings ask for -----------------------------------------------------------------------------------


def sources(spec: RunSpec) -> dict[str, str]:
    """Settings that name a local file or folder to read -> its path."""
    return {key: path for key, path in paths_in(spec, PATH_KEYS).items() if looks_local(path)}


def folders(spec: RunSpec) -> dict[str, Path]:
    """Settings that name a folder which every node writes -> that folder."""
    shared = {"run.dir": spec.run_dir}
    if Path(spec.run.dir) not in spec.cache_dir.parents:
        shared["data.cache_dir"] = spec.cache_dir
    return shared


class Needed(NamedTuple):
    """Bytes that a run writes; at least, as an optimizer of a user's tells nothing of its state."""

    checkpoint: int
    checkpoints: int  # how many there are at once
    model: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoint * self.checkpoints + self.model


def disk_needed(spec: RunSpec, own_optimizer: bool = False) -> Needed:
    """What a run writes, from the model's config alone and one step of the optimizer on a small matrix.

    own_optimizer: a function of a Python user makes it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from orchestrator.engines.precision import dtype_held
    from orchestrator.models.adapters import add_adapter
    from orchestrator.models.layers import freeze_lowest
    from orchestrator.models.loading import config_at

    init, lora = spec.model.init, spec.model.lora
    if init is not None:
        config = AutoConfig.for_model(init.model_type, **{"vocab_size": init.vocab_size, **init.config})
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
    weight, state = dtype_held(spec.precision).itemsize, 0.0 if own_optimizer else _state_bytes(spec)
    checkpoint = sum(p.numel() * (weight + state * p.requires_grad) for p in saved)
    every, steps, keeps_best = spec.checkpoint.every_steps, spec.training.max_steps, spec.evaluation.metric_for_best
    at_once = 1 if every is None and keeps_best is None else spec.checkpoint.keep + 1 + (keeps_best is not None)
    if steps is not None:
        at_once = min(at_once, steps if keeps_best or every is None else -(-steps // every))
    return Needed(int(checkpoint), at_once, 4 * exported)


def _state_bytes(spec: RunSpec) -> float:
    """Of the optimizer for each element that trains; 0 where that is not known."""
    import torch

    from orchestrator.engines.optim import optimizer_factory
    from orchestrator.engines.precision import dtype_held

    if optimizer_kind(spec.optimizer.name) != "elementwise":
        return 0.0
    if spec.optimizer.name.startswith("deepspeed."):
        return 8.0  # two moments in fp32; to build one is to compile it
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype_held(spec.precision)))
    p.grad = torch.zeros_like(p)
    optimizer = optimizer_factory(spec.optimizer)([{"params": [p], "weight_decay": 0.0}])
    optimizer.step()
    state = [value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor) and value.ndim]
    return sum(value.nbytes for value in state) / p.numel()


def space_checks(spec: RunSpec, own_optimizer: bool = False) -> list[Check]:
    """Room for what a run writes besides what it has written already; own_optimizer: as in `disk_needed`."""
    where = folders(spec)
    asks: dict[str, Callable[[], Any]] = {key: partial(_free, folder) for key, folder in where.items()}
    asks["needed"] = partial(disk_needed, spec, own_optimizer)
    asks["held"] = partial(_bytes_below, [spec.run_dir / "checkpoints", spec.run_dir / "model"])
    found = side_by_side(asks, IMPORT_S)
    needed: Needed | None = found["needed"] if isinstance(found["needed"], Needed) else None  # others say why
    more = max(FULL, needed.total - found["held"]) if needed and isinstance(found["held"], int) else FULL
    checks: list[Check] = []
    for key, folder in where.items():
        if not isinstance(free := found[key], int):  # whoever writes there says why
            continue
        wants, why, less = (more if key == "run.dir" else FULL), "", ""
        if key == "run.dir" and needed:
            of = f"{needed.checkpoints} of {_size(needed.checkpoint)} at once, and the model, {_size(needed.model)}"
            why, less = f" for checkpoints ({of})", f", lower checkpoint.keep ({spec.checkpoint.keep})"
        wrong = f"the run needs {_size(wants)} more in {folder}{why}"
        cure = f"free some space there{less}, or set {key} to another file system"
        lacks = free < wants
        name, has = f"space in {key}", f"{_size(free)} free, {_size(wants)} needed"
        checks.append(Check(name, "", f"{_size(free)} free" if lacks else has, wrong * lacks, cure * lacks))
    return checks


def _free(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _bytes_below(folders: Iterable[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _size(count: float) -> str:
    """Bytes, in a unit in which they are easy to read."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def check_answers(spec: RunSpec) -> None:
    """Refuse what would hang or break whoever touches it first: a file system that does not answer, or is full.

    Raises:
        UserError: which, and of which setting.
    """
    paths = {**{key: str(folder) for key, folder in folders(spec).items()}, **sources(spec)}
    free: dict[str, Callable[[], Any]] = {key: partial(_free, folder) for key, folder in folders(spec).items()}
    read: dict[str, Callable[[], Any]] = {key: partial(bytes_at, key, path) for key, path in sources(spec).items()}
    for key, found in side_by_side({**free, **read}, READ_S).items():
        if isinstance(found, TimeoutError):
            cure = f"mend the file system that it lies on, or set {key} to a path on another"
            raise UserError(key, paths[key], f"cannot be read ({one_line(found)})", cure)
        if key in free and isinstance(found, int) and found < FULL:
            cure = f"free some space there, or set {key} to another file system"
            raise UserError(key, paths[key], "is on a file system that is full", cure)
