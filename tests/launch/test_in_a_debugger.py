"""The commands of docs/debugging.md, as written there."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import ROOT, doc_commands
from support.run_files import losses
from support.timeouts import scaled_timeout


def test_the_commands_of_the_docs_give_one_curve(tmp_path: Path) -> None:
    (block,) = doc_commands("debugging.md", "In a debugger")
    commands = block.splitlines()
    assert len(commands) == 2
    for command in commands:
        called = command.replace("orchestrator", f"{sys.executable} -m orchestrator.cli", 1)
        done = subprocess.run(
            [*called.split(), f"run.dir={tmp_path}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=scaled_timeout(240),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "finished after step 42" in done.stdout
    assert losses(tmp_path / "two-ranks") == pytest.approx(losses(tmp_path / "debugged"), rel=1e-5)
