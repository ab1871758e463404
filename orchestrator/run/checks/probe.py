"""Probe a node before training: facts about it, and tests of files and connections with others.

Every wait has a time-out, whatever a file system or another node does.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.data.sources import check_source
from orchestrator.run.checks.parallel import failures, one_line, side_by_side
from orchestrator.run.network import use_interface
from orchestrator.settings.errors import UserError

# Libraries whose versions must match: another one may change results or be unable to communicate.
PACKAGES = (
    "dpo-orchestrator",
    "torch",
    "ray",
    "transformers",
    "tokenizers",
    "datasets",
    "deepspeed",
    "accelerate",
    "bitsandbytes",
    "numpy",
    "peft",
)
MISSING = "missing"
NOT_SEEN = "a file of the driver there is not visible"

READ_S = 5.0  # seconds after which a file system counts as hung
# seconds until a node sees files of another one; NFS may use cached metadata for a while
SHARED_S = 5.0
CONNECT_S = 3.0  # seconds within which a port answers
IMPORT_S = 25.0  # seconds within which a heavy library is imported
ALL_REDUCE_S = 12.0  # seconds to form a process group and reduce a few tensors
BANDWIDTH_BYTES = 16 * 2**20
MANY_FILES = 200  # maximum files of a folder to check


@dataclass(frozen=True)
class Card:
    """A GPU as shown by nvidia-smi."""

    name: str
    total: int  # bytes
    used: int  # bytes, by all processes


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a node that this process may use."""

    to_torch: int = 0
    reason: str = ""  # why torch sees none
    cards: tuple[Card, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Facts about a node."""

    python: str  # path of the interpreter
    versions: dict[str, str]  # of Python and PACKAGES
    gpus: Gpus
    files: dict[str, int | UserError]  # setting -> bytes at its path, or the error of reading it
    ports: tuple[int, int]  # range of ephemeral ports


class Probe:
    """Tests that run on a node: an actor under Ray, a plain object in the driver."""

    def __init__(self) -> None:
        self._created: list[Path] = []  # parent folders of the test files
        self._store: Any = None  # keeps the rendezvous port open

    def facts(self, paths: Mapping[str, str], expects_gpus: bool) -> Facts:
        """Return facts about this node. paths: setting -> path that must be readable."""
        sizes = side_by_side(
            {key: partial(bytes_at, key, path) for key, path in paths.items()}, READ_S
        )
        files = {
            key: size if isinstance(size, int) else _unreadable(key, paths[key], size)
            for key, size in sizes.items()
        }
        gpus = side_by_side({"gpus": partial(_usable_gpus, expects_gpus)}, IMPORT_S)["gpus"]
        if isinstance(gpus, Exception):
            gpus = Gpus(reason=one_line(gpus))
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return Facts(sys.executable, installed_versions(), gpus, files, (int(first), int(last)))

    def make_folders(self, folders: Mapping[str, Path]) -> dict[str, str]:
        """Create folders for test files of nodes; return {setting: error}."""

        def make(folder: Path) -> None:
            self._created += [path for path in folder.parents if not path.exists()]
            folder.mkdir(parents=True)

        return failures({key: partial(make, folder) for key, folder in folders.items()}, READ_S)

    def write_files(self, folders: Mapping[str, Path], name: str) -> dict[str, str]:
        """Write a file with that name to each folder; return {setting: error}."""

        def write(folder: Path) -> None:
            if _missing([folder]):
                raise OSError(NOT_SEEN)
            with open(folder / name, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())

        return failures(
            {key: partial(write, folder) for key, folder in folders.items()}, SHARED_S + READ_S
        )

    def unseen_files(
        self, folders: Mapping[str, Path], names: Mapping[str, Sequence[str]]
    ) -> dict[str, list[str]]:
        """Look for files with those names in each folder; return {setting: names not seen}."""

        def unseen(key: str) -> list[str]:
            return [path.name for path in _missing([folders[key] / name for name in names[key]])]

        results = side_by_side({key: partial(unseen, key) for key in folders}, SHARED_S + READ_S)
        return {
            key: list(names[key]) if isinstance(result, Exception) else result
            for key, result in results.items()
        }

    def remove_folders(self, folders: Mapping[str, Path]) -> None:
        """Remove the folders, and created parent folders that are empty."""
        failures({key: partial(shutil.rmtree, folder) for key, folder in folders.items()}, READ_S)
        for path in sorted(self._created, reverse=True):
            failures({"": path.rmdir}, READ_S)  # fails if it is not empty

    def now(self) -> float:
        """Return the time of the node's clock."""
        return time.time()

    def listen(self, address: str) -> int:
        """Accept connections at this address while the process lives; return the port."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family, backlog=1024)

        def answer() -> None:
            while True:
                server.accept()[0].close()

        threading.Thread(target=answer, daemon=True).start()
        return server.getsockname()[1]

    def connect(self, targets: Mapping[str, tuple[str, int]]) -> dict[str, str]:
        """Connect to each target; return {node: error}."""

        def connect(target: tuple[str, int]) -> None:
            socket.create_connection(target, CONNECT_S).close()

        return failures(
            {node: partial(connect, target) for node, target in targets.items()}, CONNECT_S + 1
        )

    def open_store(self, address: str | None, size: int) -> int:
        """Prepare for a process group of that size.

        With an address, host its store there and return the port.
        """
        import torch.distributed as dist

        if address is None:
            return 0
        timeout = timedelta(seconds=ALL_REDUCE_S)
        self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, 0, size, True, timeout, wait_for_workers=False
        )
        return self._store.port

    def all_reduce(
        self,
        rank: int,
        size: int,
        store_at: tuple[str, int],
        towards: str,
        interface: str | None,
        use_gpu: bool,
    ) -> float:
        """Run a few all-reduces of BANDWIDTH_BYTES over all nodes.

        Returns the bytes per second of the fastest. towards: address of another node. interface:
        as in `use_interface`.
        """
        import torch
        import torch.distributed as dist

        use_interface(interface, towards)
        timeout = timedelta(seconds=ALL_REDUCE_S)
        store = self._store or dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            *store_at, size, False, timeout
        )
        backend, device = ("nccl", "cuda") if use_gpu else ("gloo", "cpu")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        values, fastest = torch.ones(BANDWIDTH_BYTES // 4, device=device), float("inf")
        for _ in range(3):
            began = time.monotonic()
            dist.all_reduce(values)
            values[0].item()  # waits for a GPU
            fastest = min(fastest, time.monotonic() - began)
        dist.destroy_process_group()
        return BANDWIDTH_BYTES / fastest


def installed_versions() -> dict[str, str]:
    """Return the installed versions of Python and PACKAGES."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = MISSING
    return versions


def bytes_at(key: str, path: str) -> int:
    """Return the bytes of a file, or of a folder's files, after reading the first byte of each.

    Raises:
        UserError: the path does not exist.
        OSError: it cannot be read.
    """
    if key.startswith("data."):
        check_source(key, path)
    elif not os.path.isdir(path):
        raise UserError(key, path, "is not a folder", "use an existing folder or a hub name")
    files = _files_in(path) if os.path.isdir(path) else [path]
    for file in files:
        with open(file, "rb") as opened:
            opened.read(1)
    return sum(map(os.path.getsize, files))


def _files_in(folder: str) -> list[str]:
    """Return up to MANY_FILES files of a folder and its subfolders, the same on every node."""
    entries = list(os.scandir(folder))
    entries += [inner for entry in entries if entry.is_dir() for inner in os.scandir(entry.path)]
    return sorted(entry.path for entry in entries if entry.is_file())[:MANY_FILES]


def _unreadable(key: str, path: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    cure = "give the user who runs Ray read permission, or fix its file system"
    return UserError(key, path, f"cannot be read ({one_line(error)})", cure)


def _missing(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that do not exist after SHARED_S seconds."""
    deadline = time.monotonic() + SHARED_S
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return missing


def _usable_gpus(expected: bool) -> Gpus:
    """Return the GPUs of this node.

    expected: if False, torch is imported only if nvidia-smi shows any.
    """
    shown = cards()
    if not (expected or shown):
        return Gpus()
    import torch

    if torch.cuda.is_available():
        return Gpus(torch.cuda.device_count(), "", shown)
    try:
        torch.cuda.init()  # raises, with the reason
    except Exception as error:
        return Gpus(0, one_line(error), shown)
    return Gpus(0, "none is visible", shown)


def cards() -> tuple[Card, ...]:
    """Return the GPUs that this process may use, by nvidia-smi, which creates no CUDA context."""
    command = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.used",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READ_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    may_use = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards: list[Card] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        index, uuid, name, total, used = (cell.strip() for cell in line.split(","))
        if may_use is None or any(
            word and (word == index or uuid.startswith(word)) for word in may_use.split(",")
        ):
            mib = [int(cell) if cell.isdecimal() else 0 for cell in (total, used)]  # some say [N/A]
            cards.append(Card(name, mib[0] * 2**20, mib[1] * 2**20))
    return tuple(cards)
