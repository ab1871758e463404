"""`orchestrator debug` as ranks that are forks of a process with everything imported: real ranks
and real gloo without seconds of importing for each; and hooks that watch a run or make it fail.
"""

import errno
import gc
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from itertools import count, cycle
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from patience import patience, slowdown
from tiny import pair_batch
from transformers import TrainerCallback

from orchestrator import cli
from orchestrator.data import refcache
from orchestrator.engines.ddp import DdpEngine
from orchestrator.models.logps import sequence_logps
from orchestrator.models.reference import Absent
from orchestrator.training import checkpoint, ledger
from orchestrator.training.manifest import step_folder, verify
from orchestrator.training.trainer import Trainer

Hook = Callable[[], None]
"""Called in each rank before it runs: a function of this module or a partial of one, as it travels
by its name.
"""

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = [
    "orchestrator.cli",
    "orchestrator.run.local.debug",
    "transformers.models.qwen2.modeling_qwen2",
]
# deepspeed: transformers imports all of it, where it is installed, to save a model
FORKS.set_forkserver_preload(
    [*IMPORTED, "accelerate", "bitsandbytes", "deepspeed", "peft", "pytest", "warmed"]
)
GRACE_S = 5.0  # seconds on an idle machine that other ranks get to end after one has failed
TIMEOUT_S = 120.0
# Below the ports that a system deals out, and a range for each process of the tests: between the
# moment in which a port is found free and the one in which rank zero listens there, nothing that
# other tests start can take it.
FIRST_PORT, PORTS = (
    20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")),
    1000,
)
NEXT_PORT = cycle(random.Random(os.getpid()).sample(range(FIRST_PORT, FIRST_PORT + PORTS), PORTS))


class Ended(NamedTuple):
    """How each rank ended, and what all of them said."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def log(self) -> str:
        """All that was said."""
        return self.stdout + self.stderr


def run(
    settings: Path,
    *words: str,
    ranks: int = 1,
    hook: Hook | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Ended:
    """`orchestrator debug SETTINGS WORDS...` on so many ranks."""
    start_forking()
    logs = [settings.parent / f"{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        **(env or {}),
    }
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    call = ["debug", str(settings), *words]
    processes = [
        FORKS.Process(
            target=_rank,
            args=(
                logs,
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd or Path.cwd(),
                call,
                hook,
            ),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Ended(_codes(processes), *(log.read_text() for log in logs))


def finished(
    settings: Path,
    *words: str,
    ranks: int = 1,
    hook: Hook | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """The same for a run that must come to its end; returns what it said."""
    ended = run(settings, *words, ranks=ranks, hook=hook, cwd=cwd, env=env)
    assert ended.codes == [0] * ranks, ended.log
    return ended.log


@cache
def start_forking() -> None:
    """Start the process that all ranks are forks of; it finds this folder's modules by PYTHONPATH
    alone.
    """
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    for port in NEXT_PORT:
        with socket.socket() as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # what an ended run leaves there is no matter
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError  # a cycle has no end


def _codes(processes: list[Any]) -> list[int]:
    """Wait for every rank; one that waits in vain for a rank that failed is ended."""
    deadline, failed = time.monotonic() + patience(TIMEOUT_S), False
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(
            process.exitcode not in (None, cli.DONE, cli.STOPPED) for process in processes
        ):
            failed, deadline = True, time.monotonic() + GRACE_S * slowdown()
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(
    logs: list[Path], env: dict[str, str], cwd: Path, words: list[str], hook: Hook | None
) -> None:
    # what is imported stays; looking for garbage in it would copy its memory page by page
    gc.freeze()
    for descriptor, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    os.chdir(cwd)
    if hook is not None:
        hook()
    code = cli.main(words)
    sys.stdout.flush()
    os._exit(code)


# --- hooks and callbacks --------------------------------------------------------------------------


class StopsAt(TrainerCallback):
    """Asks for a stop after a step; the same command then resumes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            Path(args.output_dir, "STOP").touch()


def stops_at(step: int) -> str:
    """The word that adds StopsAt to a run."""
    return f"callbacks=[{{path: 'forked:StopsAt', kwargs: {{step: {step}}}}}]"


class EndsEpoch(TrainerCallback):
    """Asks for the end of the epoch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step == self.step


class NotesSaves(TrainerCallback):
    """Writes RUN_DIR/saves.jsonl: of which step it was told, before which one it had begun, in
    which thread, and what is wrong with the checkpoint. Lets a save in the background end while a
    step is under way; asks for one when there is an evaluation.
    """

    def __init__(self) -> None:
        self.begun = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = state.global_step + 1
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = step_folder(Path(args.output_dir, "checkpoints"), state.global_step)
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "begun": self.begun,
            "in_main": threading.current_thread() is threading.main_thread(),
            "wrong": verify(folder),
        }
        with open(Path(args.output_dir, "saves.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")


class KeepsLogps(TrainerCallback):
    """Writes what the trained policy, as it is in memory, says of PAIRS made-up pairs: [2B],
    fp64.
    """

    PAIRS = 6

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        model.eval()
        torch.save(
            sequence_logps(model, pair_batch(self.PAIRS, packed=True)),
            Path(args.output_dir, "logps.pt"),
        )


def watch() -> None:
    """Write RUN_DIR/watched{rank}.jsonl: hashes of reference and policy before training or going
    on, and after each step.
    """
    fit, after_update = Trainer.fit, Trainer._after_update

    def note(trainer: Any) -> None:
        step = trainer.engine.step
        reference = None if isinstance(step.reference, Absent) else step.reference.tensors()
        line = {
            "step": trainer.step,
            "reference": reference and sha256(*(value for _, value in sorted(reference.items()))),
            "policy": {name: sha256(p) for name, p in step.policy.named_parameters()},
        }
        with open(trainer.run_dir.path / f"watched{trainer.world.rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def watched_fit(trainer: Any) -> Any:
        note(trainer)
        return fit(trainer)

    def watched_update(trainer: Any, outputs: Any) -> None:
        after_update(trainer, outputs)
        note(trainer)

    Trainer.fit, Trainer._after_update = watched_fit, watched_update


def notes_pairs() -> None:
    """Write RUN_DIR/given{rank}.jsonl: what each batch gave of each of its pairs, and whether its
    step was skipped. The loss scale of fp16 is too large at first.
    """
    micro_steps, optimizer_step = Trainer.micro_steps, DdpEngine.optimizer_step
    given: list[dict[str, Any]] = []
    notes: list[Path] = []

    def noted(trainer: Any, made: Any) -> Any:
        if trainer.engine.scale.enabled and not trainer.pairs_seen:
            trainer.engine.scale.value = 2.0**24
        outputs = micro_steps(trainer, made)
        for batch, output in outputs:
            columns = {"pair_id": batch.pair_ids, "loss": output.losses}
            for name, both in (("", output.logps), ("ref_", output.ref_logps)):
                columns[f"{name}chosen_logps"], columns[f"{name}rejected_logps"] = both.chunk(2)
            for i in batch.pair_weights.nonzero().flatten().tolist():
                given.append(
                    {
                        "step": trainer.step + 1,
                        **{name: column[i].item() for name, column in columns.items()},
                    }
                )
        notes[:] = [trainer.run_dir.path / f"given{trainer.world.rank}.jsonl"]
        return outputs

    def told(engine: Any, apply: bool) -> Any:
        with open(notes[0], "a") as file:
            file.writelines(json.dumps({**pair, "skipped": not apply}) + "\n" for pair in given)
        given.clear()
        return optimizer_step(engine, apply)

    Trainer.micro_steps, DdpEngine.optimizer_step = noted, told


def sha256(*tensors: torch.Tensor) -> str:
    """Of their content."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def at_step(step: int, number: int) -> None:
    """Every rank sends itself a signal when it has taken that step."""
    after_update = Trainer._after_update

    def interrupted(trainer: Any, outputs: Any) -> None:
        after_update(trainer, outputs)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    Trainer._after_update = interrupted


def dies_filling(question: int) -> None:
    """SIGKILL at the so many-th question that a fill of the cache asks the reference, on every
    rank.
    """
    ask, asked = DdpEngine.reference_logps, count(1)

    def dying(engine: Any, batch: Any) -> torch.Tensor:
        if next(asked) == question:
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(engine, batch)

    DdpEngine.reference_logps = dying


def disk_full_after(writes: int) -> None:
    """No space is left for log-probs of the reference after so many writes on each rank."""
    written = count(1)

    def full(path: Any, mode: str = "r") -> Any:
        if "a" in mode and next(written) > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open(path, mode)

    refcache.__dict__["open"] = full


def dies_saving(stage: str, rank: int, step: int) -> None:
    """SIGKILL at a stage of the save of a step, on one rank.

    Every save makes a part of the ledger's tail.
    """
    ledger.PART_ROWS = 1
    if int(os.environ["RANK"]) != rank:
        return

    def is_file(start: str) -> Callable[..., bool]:
        def is_it(*args: Any) -> bool:
            path = next(arg for arg in args if isinstance(arg, Path))
            return path.name.startswith(start) and f"step_{step:08d}" in path.parent.name

        return is_it

    stages: dict[str, tuple[Any, str, Callable[..., bool], str]] = {
        "begun": (checkpoint._Draft, "write", lambda draft, *_: draft.step == step, "before"),
        "half written": (checkpoint, "save_tensors", is_file("rank_"), "in the middle"),
        "written": (checkpoint, "synced_sha256", is_file("rank_"), "before"),
        "rows half written": (checkpoint, "write_rows", is_file("pairs_"), "in the middle"),
        "part begun": (
            ledger,
            "write_rows",
            lambda _, path: path.name.startswith(".steps_"),
            "in the middle",
        ),
        "part made": (ledger, "sync_folder", lambda _: True, "after"),
        "recorded": (
            checkpoint,
            "write_atomically",
            is_file("rank_"),
            "after",
        ),  # in the background alone
        "complete": (checkpoint, "synced_sha256", is_file("meta.json"), "after"),
        "renamed": (checkpoint, "write_atomically", is_file("manifest.json"), "before"),
        "committed": (
            checkpoint,
            "retain",
            lambda folder, *_: step_folder(folder, step).exists(),
            "before",
        ),
    }
    home, name, is_due, when = stages[stage]
    call = getattr(home, name)

    def dying(*args: Any) -> Any:
        due = is_due(*args)
        if due and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = call(*args)
        if due and when == "in the middle":
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(home, name, dying)


def disk_full_saving(rank: int, step: int) -> None:
    """No space is left for a rank's part of the checkpoint of a step."""
    write = checkpoint._Draft.write

    def full(draft: Any, *args: Any) -> Any:
        if (draft.world.rank, draft.step) == (rank, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(draft, *args)

    checkpoint._Draft.write = full


def slow_saves(seconds: float) -> None:
    """Every rank takes its time to write its part of a checkpoint."""
    write = checkpoint._Draft.write

    def slow(draft: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return write(draft, *args)

    checkpoint._Draft.write = slow
