"""A signal that arrives before a run has begun stops the command with a line and exit code 3."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.early_signals import stop_signals
from support.tiny_settings import write_settings

STOPPED_WHILE_READING = """
import os, signal, sys
from orchestrator import cli

def stopped(*_):
    signal.raise_signal(int(os.environ["NUMBER"]))

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests has made it ignored
cli.load_spec = stopped
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_run_begins_is_a_line(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-c", STOPPED_WHILE_READING, "train", str(write_settings(tmp_path))]
    env = {**os.environ, "NUMBER": str(int(number))}
    ended = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    expected = f"stopped before it began (received {number.name}); the same command starts it\n"
    assert (ended.returncode, ended.stderr) == (3, expected)


def test_nohup_keeps_a_run_through_the_end_of_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
