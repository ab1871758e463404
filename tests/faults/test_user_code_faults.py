"""User code that exits, or meets a failure of the machine, ends a run with exit code 1."""

import errno
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import orchestrator
from faults.conftest import FaultRow
from orchestrator.cli import main
from orchestrator.settings.errors import MachineError, TrainingError
from support.command_line import orchestrator as command
from support.tiny_settings import raw_settings, tiny_spec

MODULE = "users_failing_code"
FAILURES: dict[str, Callable[[], BaseException]] = {
    "exits": lambda: SystemExit(0),
    "lacks memory": lambda: MemoryError(),
    "lacks a disk": lambda: OSError(errno.EIO, "Input/output error"),
}
TYPES = {"exits": "sys.exit(0)", "lacks memory": "MemoryError", "lacks a disk": "OSError"}
SOURCE = '''
"""Code as a user writes it, which fails by `failure` from the first call after `after` calls on."""
import torch
from transformers import TrainerCallback

failure, after, calls = None, 0, 0

def fail():
    global calls
    calls += 1
    if calls > after:
        raise failure()

def collate(rows):
    fail()

def loss(terms, dpo):
    fail()
    return -(terms.chosen_logps - terms.rejected_logps)

def compute_metrics(prediction):
    fail()

class Optimizer(torch.optim.SGD):
    def __init__(self, params, lr):
        fail()
        super().__init__(params, lr)

class Stepping(torch.optim.SGD):
    def step(self, closure=None):
        fail()

class Callback(TrainerCallback):
    def __init__(self):
        fail()

class Hook(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        fail()
'''
CHECKS_OF_A_LOSS = 2 * 4  # calls with synthetic pairs, before training and by its rank
WHOLE = {"kind": "ddp", "shard_optimizer": False}
KINDS: dict[str, dict[str, Any]] = {
    "collate": {"data": {"collator": f"{MODULE}:collate"}, "reference": {"cache": "off"}},
    "loss": {"dpo": {"loss_type": f"{MODULE}:loss"}},
    "compute_metrics": {"evaluation": {"compute_metrics": f"{MODULE}:compute_metrics"}},
    "Optimizer": {
        "optimizer": {"name": f"{MODULE}:Optimizer", "weight_decay": 0.0},
        "engine": WHOLE,
    },
    "Stepping": {"optimizer": {"name": f"{MODULE}:Stepping", "weight_decay": 0.0}, "engine": WHOLE},
    "Callback": {"callbacks": [f"{MODULE}:Callback"]},
    "Hook": {"callbacks": [f"{MODULE}:Hook"]},
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", KINDS)
def test_user_code_that_fails_without_fault_of_its_own(
    kind: str,
    failure: str,
    module: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    fault_row: FaultRow,
) -> None:
    module.__dict__.update(failure=FAILURES[failure])
    (tmp_path / "run.yaml").write_text(json.dumps(raw_settings(tmp_path, **KINDS[kind])))
    code = main(["debug", str(tmp_path / "run.yaml")])
    stderr = capsys.readouterr().err
    if kind == "Hook" and failure != "exits":
        assert (code, "is dropped" in caplog.text) == (0, True), stderr  # as after any exception
        fault_row("user code", f"{kind} {failure}", "the callback is dropped, the run finishes")
        return
    assert code == 1, stderr
    assert "Traceback" not in stderr
    (line,) = stderr.splitlines()
    assert f"{MODULE}.py line" in line
    assert kind in line or kind == "Stepping"
    assert TYPES[failure] in line
    assert "fix it" not in line
    fault_row("user code", f"{kind} {failure}", "exit code 1, one line with the place")


def _failing(failure: Callable[[], BaseException]) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> NoReturn:
        raise failure()

    return fails


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["ref_model", "optimizers", "compute_metrics", "data_collator"])
def test_functions_of_a_python_user(
    name: str, failure: str, tmp_path: Path, fault_row: FaultRow
) -> None:
    fails = _failing(FAILURES[failure])
    user: dict[str, Any] = {name: (fails, None) if name == "optimizers" else fails}
    spec = tiny_spec(tmp_path, reference={"cache": "off"})
    with pytest.raises(TrainingError if failure == "exits" else MachineError) as caught:
        orchestrator.debug(spec, **user)
    assert "fails" in str(caught.value)
    assert "test_user_code_faults.py line" in str(caught.value)
    fault_row("user code", f"{name} {failure}", "one line with the place")


def test_a_loss_that_fails_in_training(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module.__dict__.update(failure=FAILURES["exits"], after=CHECKS_OF_A_LOSS)
    (tmp_path / "run.yaml").write_text(json.dumps(raw_settings(tmp_path, **KINDS["loss"])))
    assert main(["debug", str(tmp_path / "run.yaml")]) == 1
    assert "for 2 pairs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["sys.exit(0)", "os._exit(0)"])
def test_ranks_that_end_with_code_0_are_no_success(
    ends: str, tmp_path: Path, fault_row: FaultRow
) -> None:
    source = f"import os, sys\ndef collate(rows):\n    {ends}\n"
    (tmp_path / "users_exit.py").write_text(source)
    blocks: dict[str, Any] = {"data": {"collator": "users_exit:collate"}}
    raw = raw_settings(tmp_path, **blocks, reference={"cache": "off"})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    ended = command("debug", "run.yaml", "--nproc", "2", cwd=tmp_path)
    assert ended.returncode == 1, ended.stderr
    assert ends.partition("(")[0] in ended.stderr
    fault_row("user code", f"{ends} in a collator of 2 ranks", "exit code 1 with a line")
