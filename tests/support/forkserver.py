"""A process with everything imported, whose forks are ranks that start at once; ports for them."""

import multiprocessing
import os
import random
import socket
from functools import cache
from itertools import cycle
from multiprocessing import forkserver
from pathlib import Path

import pytest

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = [
    "orchestrator.cli",
    "orchestrator.run.local.debug",
    "transformers.models.qwen2.modeling_qwen2",
]
# deepspeed: transformers imports all of it, where it is installed, to save a model
FORKS.set_forkserver_preload(
    [
        *IMPORTED,
        "accelerate",
        "bitsandbytes",
        "deepspeed",
        "peft",
        "pytest",
        "support.forkserver_preload",
    ]
)
# Below the ports that a system deals out, and a range for each process of the tests: between the
# moment in which a port is found free and the one in which rank 0 listens there, nothing that
# other tests start can take it.
FIRST_PORT, PORTS = (
    20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
    1000,
)
NEXT_PORT = cycle(random.Random(os.getpid()).sample(range(FIRST_PORT, FIRST_PORT + PORTS), PORTS))


@cache
def start_forking() -> None:
    """Start the process that all ranks are forks of; it finds the modules of tests/ by PYTHONPATH
    alone.
    """
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        forkserver.ensure_running()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    for port in NEXT_PORT:
        with socket.socket() as probe:
            # what an ended run leaves there is no matter
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError  # a cycle has no end
