"""Turn what nodes report into checks, each with a fix if it fails; pure Python."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.run.checks.probe import BANDWIDTH_BYTES, MISSING, NOT_SEEN, PACKAGES, Facts
from orchestrator.run.checks.report import Check, listed, size_text
from orchestrator.settings.errors import UserError

MAX_SKEW_S = 3.0  # seconds by which a clock may differ from the others
BUSY = 0.1  # fraction of a GPU's memory that a driver and a desktop may use
DRIVER = "driver"  # name of the driver process among the nodes
SILENT = "node"  # name of the check that all nodes answer


def version_checks(facts: Mapping[str, Facts], driver: str = DRIVER) -> list[Check]:
    """Check for the same versions everywhere.

    The driver, which computes nothing, may have another build of torch.
    """
    checks: list[Check] = []
    for package in ("python", *PACKAGES):
        versions = {node: of.versions[package] for node, of in facts.items()}
        others_first = sorted(versions, key=lambda node: node == driver)
        usual = _most_common(versions[node] for node in others_first)
        for node, version in versions.items():
            same_release = node == driver and _without_build(version) == _without_build(usual)
            is_wrong = version != usual and not same_release
            wrong = f"the others have {usual}" if is_wrong else ""
            cure = _how_to_install(facts[node], package, usual) if is_wrong else ""
            checks.append(Check(package, node, version, wrong, cure))
    return checks


def _without_build(version: str) -> str:
    """Return a version without its build: 2.13.0 for 2.13.0+cu130."""
    return version.partition("+")[0]


def _most_common(values: Iterable[Any]) -> Any:
    """Return the most common value; the first of several."""
    return Counter(values).most_common(1)[0][0]


def _how_to_install(facts: Facts, package: str, version: str) -> str:
    """Return how to install a version on a node."""
    if package == "python":
        return f"start its Ray with Python {version}"
    if package == "dpo-orchestrator":
        return "install the same checkout there"
    pip = f"run {facts.python} -m pip"
    if version == MISSING:
        return f"{pip} uninstall {package} there"
    build = version.partition("+")[2] if package == "torch" else ""
    # such builds are only in an index of their own
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"{pip} install {package}=={version}{index} there, and restart its Ray"


def gpu_checks(
    facts: Mapping[str, Facts], expected: Mapping[str, float], idle: bool
) -> list[Check]:
    """Check that torch can use the expected GPUs of each node.

    idle: Ray has assigned no GPU, so no other process may use one.
    """
    return [
        _gpu_check(node, of, expected[node], idle) for node, of in facts.items() if node in expected
    ]


def _gpu_check(node: str, facts: Facts, expected: float, idle: bool) -> Check:
    gpus, wrong, cure = facts.gpus, "", ""
    least = max(expected, len(gpus.cards))
    busy = [card for card in gpus.cards if card.used > BUSY * card.total]
    if gpus.to_torch < least:
        wrong = f"there should be {least:g} ({gpus.reason or 'the others are hidden'})"
        cure = _how_to_make_gpus_usable(facts)
    elif busy and idle:
        used, total = size_text(busy[0].used), size_text(busy[0].total)
        wrong = f"another process uses {used} of {total} on a GPU that Ray considers free"
        cure = "end the processes that nvidia-smi shows there"
    cards = Counter(f"{card.name}, {size_text(card.total)}" for card in gpus.cards).items()
    value = f"{gpus.to_torch} for torch" + "".join(f"; {count} x {card}" for card, count in cards)
    if gpus.reason and not wrong:
        value += f" ({gpus.reason})"
    return Check("GPUs", node, value, wrong, cure)


def _how_to_make_gpus_usable(facts: Facts) -> str:
    """Return how to make the GPUs of a node usable by torch."""
    if not facts.gpus.cards:
        elsewhere = "run on machines with GPUs (RAY_ADDRESS), or remove GPU from cluster.resources"
        return f"nvidia-smi shows no GPU there: fix its NVIDIA driver, {elsewhere}"
    if "compiled" in facts.gpus.reason:
        torch = f"torch=={_without_build(facts.versions['torch'])}"
        return f"run {facts.python} -m pip install {torch} there, a build with CUDA"
    if "too old" in facts.gpus.reason:
        return "update the NVIDIA driver there, or install a build of torch for its CUDA version"
    return f"start its Ray without CUDA_VISIBLE_DEVICES, or with --num-gpus={facts.gpus.to_torch}"


def file_checks(facts: Mapping[str, Facts], paths: Mapping[str, str]) -> list[Check]:
    """Check that all nodes can read the same files."""
    checks: list[Check] = []
    for key, path in paths.items():
        sizes = [size for of in facts.values() if isinstance(size := of.files[key], int)]
        for node, of in facts.items():
            size = of.files[key]
            if isinstance(size, UserError):
                checks.append(Check(key, node, path, size.rule, size.cure))
                continue
            wrong, cure = "", ""
            if size != (usual := _most_common(sizes)):
                wrong = f"has {size} bytes there, but {usual} on the others"
                cure = "copy the same files there, or to a file system shared by all nodes"
            checks.append(Check(key, node, path, wrong, cure))
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
        for node, reasons in failed.items():
            writers = unseen.get(node, {}).get(key, [])
            if writers or reasons.get(key) == NOT_SEEN:
                checks.append(_not_shared(key, folder, node, writers))
            elif key in reasons:
                checks.append(not_writable(key, folder, node, reasons[key]))
            else:
                checks.append(Check(key, node, str(folder)))
    return checks


def _not_shared(key: str, folder: Path, node: str, writers: list[str]) -> Check:
    """Return the failed check of a folder in which a node does not see the files of writers."""
    files = f"files written by {listed(writers) or 'the driver'}"
    mount = f"mount the file system of {folder} there"
    cure = f"{mount}, or set {key} to a folder shared by all nodes"
    return Check(key, node, str(folder), f"{files} are not visible, so it is not shared", cure)


def not_writable(key: str, folder: Path, node: str, reason: str) -> Check:
    """Return the failed check of a folder that a node cannot write."""
    permission = "give the user who runs Ray write permission"
    cure = f"free some space, {permission}, or set {key} to another folder"
    return Check(key, node, str(folder), f"cannot be written ({reason})", cure)


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
            setting = "net.ipv4.ip_local_port_range"
            allow = f"allow TCP to its ports {ports} ({setting})"
            cure = f"{allow} from the other nodes in its firewall"
        checks.append(Check("ports", target, ports, wrong, cure))
    return checks


def bandwidth_checks(rates: Mapping[str, float]) -> list[Check]:
    """Report the bandwidth of an all-reduce, which passes if it finishes."""
    if not rates:
        return []
    slowest = f"{size_text(min(rates.values()))}/s"
    rate = f"{slowest}, {size_text(BANDWIDTH_BYTES)} over {len(rates)} nodes"
    return [Check("all-reduce", node, rate) for node in rates]


def silence_checks(silent: Iterable[tuple[str, str, str]]) -> list[Check]:
    """Return failed checks for nodes that did not answer. silent: (method, node, reason)."""
    checks: list[Check] = []
    for method, node, reason in silent:
        if method in ("open_store", "all_reduce"):
            interface = "an interface through which the nodes reach each other"
            cure = f"set cluster.network_interface to {interface}"
            wrong = "an all-reduce between the nodes fails"
            checks.append(Check("all-reduce", node, reason, wrong, cure))
        else:
            wrong = f"could not be checked ({method})"
            is_up = "check that it is up (ray status) and its Ray logs"
            cure = f"{is_up}, or remove it from the cluster"
            checks.append(Check(SILENT, node, reason, wrong, cure))
    return checks
