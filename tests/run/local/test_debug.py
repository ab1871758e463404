"""The flags of `orchestrator debug`, seen from outside: files, weights, and a person at the
terminal.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch

from orchestrator import cli
from orchestrator.run.local.debug import debug
from orchestrator.run.local.trial import dry_run, overfit
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.training.trainer import Trainer
from support.debug_runs import finish_debug
from support.run_callbacks import stops_at
from support.timeouts import scaled_timeout
from support.tiny_settings import tiny_spec, write_settings

PROMPT = r"\(Pdb\) "
MINE = """
import os

import torch
from transformers import TrainerCallback

class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        taken = state.global_step
        breakpoint()
        if taken == 2:
            raise ValueError("after two steps")

class Sgd(torch.optim.SGD):
    taken = 0

    def step(self, closure=None):
        self.taken += 1
        if self.taken == 2:
            rank = os.environ["RANK"]
            raise ZeroDivisionError("in the second step")
        return super().step(closure)
"""


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert debug(tiny_spec(folder)).status == "finished"
    return folder


def test_one_batch_is_learned_by_heart_and_nothing_is_kept(tmp_path: Path) -> None:
    settings = write_settings(
        tmp_path,
        optimizer={"lr": 5e-3},
        training={"max_steps": 40},
        reference={"kind": "precomputed"},
        checkpoint={"every_steps": 10},
        evaluation={"every_steps": 10},
    )
    output = finish_debug(settings, "--overfit", stops_at(2), ranks=2)  # no callback is asked
    *_, last = output.splitlines()
    assert last.startswith("loss 0.693147 at first")
    assert last.endswith("after 40 steps on the same 8 pairs; nothing was kept")
    assert float(last.split(", ")[1].split()[0]) < 0.05
    assert "saved" not in output
    assert "evaluation" not in output.replace("evaluation pairs", "")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".cache"]


def test_a_batch_is_learned_for_as_many_steps_as_the_epochs_have(tmp_path: Path) -> None:
    """The last batch of an epoch is smaller; and the first loss is that of one step, however seldom
    a run logs.
    """
    training = {"max_steps": None, "epochs": 3, "logging_steps": 10}
    result = overfit(tiny_spec(tmp_path, training=training, batch={"global_batch_size": 12}))
    assert (result.steps, result.pairs) == (9, 12)
    assert result.first == pytest.approx(math.log(2), abs=1e-6)
    assert result.last < result.first


def test_a_dry_run_leaves_weights_and_runs_as_they_are(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, seen = content(finished / "runs" / "tiny"), []
    forward_backward = Trainer.forward_backward

    def watched(trainer: Trainer, built: Any) -> Any:
        weights = trainer.engine.step.policy.state_dict()
        seen.append((weights, {name: value.clone() for name, value in weights.items()}))
        return forward_backward(trainer, built)

    monkeypatch.setattr(Trainer, "forward_backward", watched)
    # with which that run could not go on
    tried = dry_run(tiny_spec(finished, optimizer={"lr": 1.0}))
    ((now, then),) = seen
    assert all(torch.equal(now[name], value) for name, value in then.items())
    assert content(finished / "runs" / "tiny") == before
    first = json.loads((finished / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1
    assert tried.metrics["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert tried.metrics["logps/chosen"] == pytest.approx(first["logps/chosen"], abs=1e-3)
    assert tried.grad_norm == pytest.approx(first["grad_norm"], rel=1e-4)
    assert tried.peak_bytes > 2**20
    output = capsys.readouterr().out
    assert "forward and backward pass of the first 8 pairs" in output
    assert "peak memory" in output


def test_a_trace_of_chosen_steps_on_each_rank(tmp_path: Path) -> None:
    output = finish_debug(write_settings(tmp_path), "--profile", "2:3", ranks=2)
    for rank in (0, 1):
        path = tmp_path / "runs" / "tiny" / "profile" / f"rank_{rank:05d}.json"
        assert f"trace of steps 2 to 3: {path}; open it at https://ui.perfetto.dev" in output
        events = json.loads(path.read_text())["traceEvents"]
        spans = {event["name"]: event for event in events if event.get("ph") == "X"}
        assert {name for name in spans if name.startswith("step ")} == {"step 2", "step 3"}
        assert spans["step 2"]["dur"] > 0
        assert any(name.startswith("aten::") for name in spans)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--overfit", "--profile=1:2"],
            "--overfit = True: cannot be combined with --profile; remove",
        ),
        (["--dry-run", "--overfit"], "--dry-run = True: cannot be combined with --overfit; remove"),
        (["--dry-run", "--profile"], "--dry-run = True: cannot be combined with --profile; remove"),
        (
            ["--replay-step", "3", "--nproc", "2"],
            "--replay-step = 3: cannot be combined with --nproc",
        ),
        (
            ["--replay-step", "3", "--dry-run"],
            "--replay-step = 3: cannot be combined with --dry-run",
        ),
        (["--replay-step", "3"], "RUN_DIR = '{file}': is a file, not the directory of a run"),
        (
            ["--profile"],
            "--profile = True: the run has finished after step 4, so no step is left to profile; "
            "choose",
        ),
        (
            ["--profile=4:9", "run.name=new"],
            "--profile = '4:9': the remaining steps of this run are 1 to 4; for example",
        ),
    ],
)
def test_debug_flags_without_effect_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    file = write_settings(finished)
    # the file after the flags: a bare --profile leaves it alone
    assert cli.main(["debug", *words, str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected.format(file=file)}")


@pytest.mark.parametrize(
    "words", [["--profile=5:3"], ["--profile", "0"], ["--profile=1:2:3"], ["--replay-step", "0"]]
)
def test_a_wrong_range_of_steps_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["debug", "run.yaml", *words])
    assert ended.value.code == 2
    assert "counted from 1" in capsys.readouterr().err


# --- at the terminal ------------------------------------------------------------------------------


@contextmanager
def typing(folder: Path, *words: str) -> Iterator[Any]:
    """`orchestrator debug run.yaml WORDS...` with a terminal, where `MINE` is a module."""
    (folder / "mine.py").write_text(MINE)
    command = ["-m", "orchestrator.cli", "debug", str(write_settings(folder)), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = pexpect.spawn(
        sys.executable,
        command,
        cwd=str(folder),
        env=env,
        encoding="utf-8",
        timeout=scaled_timeout(240),
    )
    try:
        yield child
    finally:
        child.close(force=True)


def test_a_breakpoint_has_the_terminal_and_an_exception_its_line(tmp_path: Path) -> None:
    with typing(tmp_path, "--pdb", "callbacks=[mine:Stops]") as child:
        child.expect("-> if taken == 2:")
        child.expect(PROMPT)
        child.sendintr()  # ends a command that is typed, and asks no run to stop
        child.expect("--KeyboardInterrupt--")
        child.expect(PROMPT)
        child.sendline("import sys; taken, 'torch' in sys.modules, 'ray' in sys.modules")
        child.expect_exact("(1, True, False)")
        child.sendline("c")
        child.expect("step 1/4: loss")  # a line: the bar has given way
        child.expect(PROMPT)
        child.sendline("c")
        child.expect("ValueError: after two steps")
        child.expect('-> raise ValueError\\("after two steps"\\)')
        child.expect(PROMPT)
        child.sendline("p state.global_step + 40")
        child.expect_exact("42")
        child.sendline("q")
        child.expect(pexpect.EOF)
    assert child.exitstatus == 1


def test_quitting_the_debugger_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "stdin", StringIO("p taken\nq\n"))
    monkeypatch.setattr(ConsoleCallback, "gives_way", False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "quits.py").write_text(MINE)
    assert cli.main(["debug", str(write_settings(tmp_path)), "callbacks=[quits:Stops]"]) == 1
    output = capsys.readouterr()
    assert "(Pdb) 1\n" in output.out
    assert output.err == "aborted\n"


def test_only_one_of_two_failing_ranks_gets_the_terminal(tmp_path: Path) -> None:
    words = ["--nproc", "2", "--pdb", "optimizer.name=mine:Sgd", "engine.shard_optimizer=false"]
    with typing(tmp_path, *words) as child:
        child.expect("rank ([01]): ZeroDivisionError: in the second step")
        rank = child.match.group(1)
        child.expect('-> raise ZeroDivisionError\\("in the second step"\\)')
        child.expect(PROMPT)
        child.sendline(
            "import os, psutil; from torch.distributed.distributed_c10d import "
            "_get_default_store as store"
        )
        # the other one has failed as well
        child.sendline("while store().add('failure', 0) < 2: pass")
        child.sendline("both = psutil.Process(os.getppid()).children()")
        child.sendline(
            "f'{len(both)} ranks, rank {rank}, gone {psutil.wait_procs(both, timeout=2)[0]}'"
        )
        child.expect_exact(f"'2 ranks, rank {rank}, gone []'")
        child.sendline("q")
        child.expect("Traceback")
        child.expect(pexpect.EOF)
        assert "(Pdb)" not in child.before
    assert child.exitstatus == 1
