"""Run `orchestrator debug` on real gloo ranks: forks of a process with everything imported."""

import gc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator import cli
from support.forkserver import FORKS, free_port, start_forking
from support.timeouts import scaled_timeout, slowdown

Hook = Callable[[], None]
"""Called in each rank before it runs: a function of run_hooks.py or a partial of one, as it
travels by its name.
"""
GRACE_S = 5.0  # seconds on an idle machine that other ranks get to end after one has failed
TIMEOUT_S = 120.0


class Ended(NamedTuple):
    """Exit code of each rank, and the output of all of them."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def log(self) -> str:
        """All that was said."""
        return self.stdout + self.stderr


def run_debug(
    settings: Path,
    *words: str,
    ranks: int = 1,
    hook: Hook | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Ended:
    """`orchestrator debug SETTINGS WORDS...` on so many ranks."""
    start_forking()
    logs = [settings.parent / f"{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        **(env or {}),
    }
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    call = ["debug", str(settings), *words]
    processes = [
        FORKS.Process(
            target=_rank,
            args=(
                logs,
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd or Path.cwd(),
                call,
                hook,
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Ended(_codes(processes), *(log.read_text() for log in logs))


def finish_debug(
    settings: Path,
    *words: str,
    ranks: int = 1,
    hook: Hook | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """The same for a run that must come to its end; returns what it said."""
    ended = run_debug(settings, *words, ranks=ranks, hook=hook, cwd=cwd, env=env)
    assert ended.codes == [0] * ranks, ended.log
    return ended.log


def _codes(processes: list[Any]) -> list[int]:
    """Wait for every rank; one that waits in vain for a rank that failed is ended."""
    deadline, failed = time.monotonic() + scaled_timeout(TIMEOUT_S), False
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(
            process.exitcode not in (None, cli.DONE, cli.STOPPED) for process in processes
        ):
            failed, deadline = True, time.monotonic() + GRACE_S * slowdown()
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(
    logs: list[Path], env: dict[str, str], cwd: Path, words: list[str], hook: Hook | None
) -> None:
    # what is imported stays; looking for garbage in it would copy its memory page by page
    gc.freeze()
    for descriptor, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    os.chdir(cwd)
    if hook is not None:
        hook()
    code = cli.main(words)
    sys.stdout.flush()
    os._exit(code)
