"""The logs of the ranks: where each writes, and the driver that prints that of rank 0."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.training.rundir import RunDir


def rank_log(run_dir: RunDir, rank: int) -> Path:
    """Return the log of a rank's output under Ray, over all attempts."""
    return run_dir.logs / f"rank_{rank:05d}.log"


@contextmanager
def following(path: Path) -> Iterator[None]:
    """Print lines as they are appended to a file.

    Ray's own forwarding would prefix each line and add others.
    """
    path.touch()
    over = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            file.seek(0, os.SEEK_END)
            while True:
                ending = over.is_set()  # read once more after the end, for the important last lines
                for line in file:
                    print(line, end="", flush=True)
                if ending:
                    return
                over.wait(0.2)

    thread = threading.Thread(target=follow, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
