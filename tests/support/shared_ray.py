"""One Ray on this machine for all tests of a session that start a run on a single node."""

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from support.forkserver import free_port
from support.timeouts import scaled_timeout

START_S = 60.0


@contextlib.contextmanager
def started_ray(log: Path) -> Iterator[dict[str, str]]:
    """Start a head without a dashboard, and kill it with all that it started at the end.

    Yields:
        The environment of a command that joins it.
    """
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env |= access | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    # a folder of its own, with a short name: the sockets in it have long ones
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--disable-usage-stats", "--include-dashboard=false", f"--temp-dir={folder}"]
        command += [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-gpus=0"]
        command += [f"--num-cpus={len(os.sched_getaffinity(0))}", "--object-store-memory=268435456"]
        with open(log, "w") as file:
            head = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + scaled_timeout(START_S)
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield access | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            kill_tree(head.pid)
            head.wait()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started, and wait until they are gone."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes[1:], timeout=scaled_timeout(10))
