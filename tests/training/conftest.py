"""Fixtures of the tests of training."""

from pathlib import Path

import pytest

from orchestrator.training.rundir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run directory with its folder of logs."""
    directory = RunDir(tmp_path)
    directory.logs.mkdir()
    return directory
