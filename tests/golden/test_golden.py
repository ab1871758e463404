"""Twenty steps of a fixed run in fp64, to 1e-9: a change that does not mean to touch the maths
leaves them as they are.

To accept a change that does: python tests/golden/test_golden.py, and say why in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.command_line import orchestrator
from support.run_files import metric_lines, without_times
from support.tiny_settings import write_settings

GOLDEN = Path(__file__).parent / "golden.json"
SETTINGS: dict[str, Any] = {
    "precision": "fp64",
    "training": {"max_steps": 20, "logging_steps": 1, "max_grad_norm": 1.0},
    "scheduler": {"name": "cosine", "warmup_steps": 4},
    "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
    "evaluation": {"every_steps": 10},
}


def golden_run(folder: Path) -> list[dict[str, Any]]:
    ended = orchestrator("debug", write_settings(folder, **SETTINGS))
    assert ended.returncode == 0, ended.stderr
    lines = metric_lines(folder / "runs" / "tiny")
    return [without_times(line) for line in lines]


def test_twenty_steps_equal_the_golden_run(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    actual = golden_run(tmp_path)
    assert [line["step"] for line in actual] == list(range(21))
    for line, golden in zip(actual, expected, strict=True):
        assert line == pytest.approx(golden, rel=1e-9, abs=1e-9)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        lines = golden_run(Path(folder))
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
