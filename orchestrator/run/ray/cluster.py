"""Start Ray on this machine or join the cluster at RAY_ADDRESS; errors are one line with a fix."""

import atexit
import errno
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

from orchestrator.run.checks.parallel import one_line
from orchestrator.run.checks.probe import CONNECT_S
from orchestrator.run.ray.guardian import guarded
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec

# Ray's default is 30 % of the memory, and it fails to start if /dev/shm is smaller (64 MB in a
# container). Runs send only settings and small objects through Ray; the rest spills to disk.
OBJECT_STORE_BYTES = 256 * 2**20
SOCKET_BYTES = 107  # maximum length of a Unix socket's name on Linux
# below Ray's folder
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
TRAIN_V2 = "RAY_TRAIN_V2_ENABLED"
NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOENT)


def is_joined() -> bool:
    """Return whether the run joins an existing cluster, which others may use too."""
    return bool(os.environ.get("RAY_ADDRESS"))


def usable_cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def entered(spec: RunSpec | None) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine; leave or stop it at the end.

    Raises:
        UserError: neither is possible in this environment.
    """
    authenticate(spec)
    # else Ray warns that its default will change
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    check_ray_address()
    # Ray starts workers at nice 15: beside two busy processes on two cores ranks got 3 % of a core
    os.environ.setdefault("RAY_worker_niceness", "0")
    use_train_v2()
    with nullcontext({}) if is_joined() else _local_options() as options:
        import ray

        if ray.is_initialized():
            rule = "this process has already called ray.init"
            raise UserError("ray.init", None, rule, "call ray.shutdown() before training")
        try:
            with _own_signals():
                ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except Exception as error:  # Ray raises many types, including Exception itself
            if is_joined():
                raise _cannot_join(error) from None
            raise _cannot_start(error, options["_temp_dir"]) from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _local_options() -> Iterator[dict[str, Any]]:
    """Yield the arguments of ray.init for Ray on this machine."""
    with ray_folder() as folder, guarded():
        yield {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": usable_cores(),
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which ray.init replaces by one that exits with 15.

    SIGHUP is blocked, for good in the processes that are started inside: a closed terminal sends it
    to all of them, and the run needs its workers to save.
    """
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    stopped = False
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        stopped = True
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if stopped:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def ray_folder() -> Iterator[str]:
    """Yield the folder for Ray's files: its default, or a short link to it.

    Raises:
        UserError: socket names would be too long, and no short folder is writable.
    """
    key = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    parent = os.path.abspath(os.environ.get(key) or "/tmp")
    folder = os.path.join(parent, "ray")
    if len(os.fsencode(folder + LONGEST_SOCKET)) <= SOCKET_BYTES:
        yield folder
        return
    short = next((each for each in SHORT_FOLDERS if os.access(each, os.W_OK | os.X_OK)), None)
    if short is None:
        rule = f"is too long: the name of a socket in it can have at most {SOCKET_BYTES} bytes"
        cure = "set RAY_TMPDIR to a shorter folder that you can write to"
        raise UserError(key, parent, rule, cure)
    with tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True) as here:
        link = os.path.join(here, "t")
        os.symlink(_created(folder, key), link)
        where = f"Ray's files are in {folder}, through the link {link}"
        print(f"{where}: {key} is too long for its sockets", flush=True)
        yield link


def _created(folder: str, key: str) -> str:
    """Create a folder for Ray and return it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _cannot_use(key, os.path.dirname(folder), error) from None
    return folder


def _cannot_use(key: str, folder: str, error: OSError) -> UserError:
    rule = f"Ray's files cannot be written there ({one_line(error)})"
    cure = "set RAY_TMPDIR to a folder with room that you can write to"
    return UserError(key, folder, rule, cure)


def use_train_v2() -> None:
    """Enable Ray Train V2, which the driver needs, regardless of the environment.

    Raises:
        UserError: this process has already imported Ray Train V1.
    """
    value = os.environ.get(TRAIN_V2)
    train, v2 = sys.modules.get("ray.train"), sys.modules.get("ray.train.v2.api.config")
    # the name of its module does not tell: Ray 2.60 gives both versions "ray.train"
    if train is not None and (v2 is None or train.ScalingConfig is not v2.ScalingConfig):
        rule = "ray.train was imported with this value, but runs need Ray Train V2"
        raise UserError(TRAIN_V2, value, rule, f"unset {TRAIN_V2}")
    if value is not None and value.lower() not in ("1", "true"):
        print(f"{TRAIN_V2}={value} is ignored: runs need Ray Train V2", flush=True)
    os.environ[TRAIN_V2] = "1"


def _cannot_join(error: Exception) -> UserError:
    rule = f"cannot be joined ({shorten(one_line(error), 200)})"
    cure = "use the Python, ray and RAY_AUTH_TOKEN of that cluster, or unset RAY_ADDRESS"
    return UserError("RAY_ADDRESS", os.environ["RAY_ADDRESS"], rule, cure)


def _cannot_start(error: Exception, folder: str) -> UserError:
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        return _cannot_use("RAY_TMPDIR", os.path.dirname(folder), error)
    logs = next(Path(folder).resolve().glob(f"session_*_{os.getpid()}/logs"), folder)
    cure = f"see {logs}, or train without Ray: orchestrator debug FILE --nproc N"
    rule = f"Ray does not start on this machine ({one_line(error)})"
    return UserError("RAY_ADDRESS", None, rule, cure)


def authenticate(spec: RunSpec | None) -> None:
    """Set the authentication of a Ray that this process starts; must run before ray is imported."""
    if is_joined() or spec is None:
        return  # an existing cluster has its own
    os.environ["RAY_AUTH_MODE"] = spec.cluster.auth
    if spec.cluster.auth == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


@functools.cache  # Ray reads it once per process
def _token_file() -> Path:
    """Create a token, until this process ends; other users can read Ray's default file, not it."""
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def check_ray_address() -> None:
    """Check that something listens at RAY_ADDRESS: Ray would try for minutes.

    Raises:
        UserError: nothing listens, or it is the address of a job server.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        rule = "is the address of a job server, not of a cluster"
        cure = "use it with orchestrator submit --to ray --address, or set RAY_ADDRESS=HEAD:6379"
        raise UserError("RAY_ADDRESS", address, rule, cure)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        rule = f"no Ray answers there ({one_line(error)})"
        cure = "start the cluster's head there (ray start --head), or unset RAY_ADDRESS"
        raise UserError("RAY_ADDRESS", address, rule, cure) from None
