"""The command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from support.timeouts import scaled_timeout


def orchestrator(
    *words: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`orchestrator WORDS...` in a process of its own; stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=scaled_timeout(timeout),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        check=False,
    )
