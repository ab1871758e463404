"""Start a Ray on this machine, or join the cluster at RAY_ADDRESS; whatever fails is one line with its fix."""

import atexit
import errno
import functools
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

from orchestrator.run.probe import CONNECT_S, one_line
from orchestrator.settings.spec import RunSpec, UserError

# Ray would take 30 % of the memory, and refuses to start where /dev/shm is smaller (64 MB in a container). Ray carries
# settings and small objects here; what does not fit goes to disk.
OBJECT_STORE_BYTES = 256 * 2**20
SOCKET_BYTES = 107  # of the name of a Unix socket on Linux
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # below Ray's folder
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
TRAIN_V2 = "RAY_TRAIN_V2_ENABLED"


def is_joined() -> bool:
    """Return True if the cluster exists already, and others may use it too."""
    return bool(os.environ.get("RAY_ADDRESS"))


def usable_cores() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def entered(spec: RunSpec | None) -> Iterator[None]:
    """Enter the cluster at RAY_ADDRESS, or start a Ray on this machine; leave or stop it afterwards.

    Raises:
        UserError: neither is possible as the environment is.
    """
    authenticate(spec)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that its default will change
    check_head()
    _use_train_v2()
    with nullcontext({}) if is_joined() else _local_options() as options:
        import ray

        if ray.is_initialized():
            rule, cure = "this process has called ray.init already", "call ray.shutdown() before training"
            raise UserError("ray.init", None, rule, cure)
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
        except Exception as error:  # Ray raises many types, Exception itself among them
            raise _cannot_join(error) if is_joined() else _cannot_start(error, options["_temp_dir"]) from None
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _local_options() -> Iterator[dict[str, Any]]:
    """Yield the arguments of ray.init for a Ray on this machine."""
    with _ray_folder() as folder:
        yield {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": usable_cores(),
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": folder,
        }


@contextmanager
def _ray_folder() -> Iterator[str]:
    """Yield the folder for Ray's files: its default, through a short link where socket names would be too long.

    Raises:
        UserError: they would be, and no short folder can be written.
    """
    key = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    parent = os.path.abspath(os.environ.get(key) or "/tmp")
    folder = os.path.join(parent, "ray")
    if len(os.fsencode(folder + LONGEST_SOCKET)) <= SOCKET_BYTES:
        yield folder
        return
    short = next((each for each in SHORT_FOLDERS if os.access(each, os.W_OK | os.X_OK)), None)
    if short is None:
        rule = f"is too long: a socket below it can have {SOCKET_BYTES} bytes in its name"
        raise UserError(key, parent, rule, "set RAY_TMPDIR to a shorter folder that you can write to")
    with tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True) as here:
        link = os.path.join(here, "t")
        os.symlink(_existing(folder, key), link)
        print(f"Ray's files are in {folder}, by the link {link}: {key} is too long for its sockets", flush=True)
        yield link


def _existing(folder: str, key: str) -> str:
    """Create a folder of Ray's and return it."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _cannot_use(key, os.path.dirname(folder), error) from None
    return folder


def _cannot_use(key: str, folder: str, error: OSError) -> UserError:
    rule = f"Ray's files cannot be written there ({one_line(error)})"
    return UserError(key, folder, rule, "set RAY_TMPDIR to a folder with room that you can write to")


def _use_train_v2() -> None:
    """Switch Ray Train V2 on, which the driver is written for, whatever the environment says.

    Raises:
        UserError: this process has imported the other one already.
    """
    value = os.environ.get(TRAIN_V2)
    train = sys.modules.get("ray.train")
    if train is not None and ".v2." not in train.ScalingConfig.__module__:
        rule = "ray.train was imported with it, and the driver needs Ray Train V2"
        raise UserError(TRAIN_V2, value, rule, f"unset {TRAIN_V2}")
    if value is not None and value.lower() not in ("1", "true"):
        print(f"{TRAIN_V2}={value} is ignored: runs need Ray Train V2", flush=True)
    os.environ[TRAIN_V2] = "1"


def _cannot_join(error: Exception) -> UserError:
    rule = f"cannot be joined ({shorten(one_line(error), 200)})"
    cure = "run this by the Python, the ray and the RAY_AUTH_TOKEN of that cluster, or unset RAY_ADDRESS"
    return UserError("RAY_ADDRESS", os.environ["RAY_ADDRESS"], rule, cure)


def _cannot_start(error: Exception, folder: str) -> UserError:
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOENT):
        return _cannot_use("RAY_TMPDIR", os.path.dirname(folder), error)
    logs = next(Path(folder).resolve().glob(f"session_*_{os.getpid()}/logs"), folder)
    cure = f"see {logs}, or train without Ray: orchestrator debug FILE --nproc N"
    return UserError("RAY_ADDRESS", None, f"a Ray of our own does not start here ({one_line(error)})", cure)


def authenticate(spec: RunSpec | None) -> None:
    """Set how a Ray of our own is entered, before ray is imported, which reads it then."""
    if is_joined() or spec is None:
        return  # one that is joined has its own
    os.environ["RAY_AUTH_MODE"] = spec.cluster.auth
    if spec.cluster.auth == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


@functools.cache  # Ray reads it once in a process
def _token_file() -> Path:
    """A token that only this user can read, until this process ends; Ray's own default is readable by the world."""
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def check_head() -> None:
    """Refuse a RAY_ADDRESS at which nobody listens: Ray would try for minutes.

    Raises:
        UserError: nobody does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        cure = "give that one to orchestrator submit --to ray --address, or set RAY_ADDRESS=HEAD:6379"
        raise UserError("RAY_ADDRESS", address, "is the address of a job server, which starts no workers", cure)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        cure = "start the cluster's head there (ray start --head), or unset RAY_ADDRESS"
        raise UserError("RAY_ADDRESS", address, f"no Ray answers there ({one_line(error)})", cure) from None
