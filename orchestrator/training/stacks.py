"""Write the Python stacks of a process to a file, with py-spy where it is installed."""

import faulthandler
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

TIMEOUT_S = 15.0


def write_own_stacks(path: Path) -> None:
    """Write the stacks of all threads of this process."""
    partial = path.with_suffix(".partial")
    with suppress(OSError):
        if not _write_with_py_spy(os.getpid(), partial):
            with partial.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        os.replace(partial, path)


def write_stacks_of(pid: int, path: Path) -> None:
    """Write the stacks of another process of this machine, if py-spy is installed and may."""
    partial = path.with_suffix(".partial")
    with suppress(OSError):
        if _write_with_py_spy(pid, partial):
            os.replace(partial, path)


def _write_with_py_spy(pid: int, path: Path) -> bool:
    """Return whether py-spy has written the stacks."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return False
    # nonblocking: it must not pause a process that is stopped, or the one that waits for it
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        with path.open("wb") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.DEVNULL, timeout=TIMEOUT_S, check=False
            )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and path.stat().st_size > 0
