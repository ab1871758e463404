"""A rank that dies is named with its place, and the rank that lost it is not."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support import injector
from support.command_line import orchestrator
from support.repository import ROOT
from support.tiny_settings import write_settings


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("kill", r"killed by SIGKILL, not for lack of memory"),
        pytest.param("segv", r"killed by SIGSEGV in .*\(injector.py line", marks=pytest.mark.slow),
        pytest.param("os_error", r"raised OSError: .* \(injector.py line", marks=pytest.mark.slow),
    ],
)
def test_the_rank_that_died_first_is_named(
    tmp_path: Path, kind: str, expected: str, fault_row: Callable[..., None]
) -> None:
    env = injector.plan(tmp_path, injector.Fault(kind, "loss", 2, 1))
    env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    words = ["--nproc", "2", *injector.words("loss")]
    ended = orchestrator("debug", write_settings(tmp_path), *words, env=env)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1
    assert re.match(rf"error: rank 1 on \S+, step 2, \w+, pairs [\d, ]+: {expected}", last), last
    fault_row("a rank dies", f"{kind} in the loss of a rank, debug", "named, exit 1")
