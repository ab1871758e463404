"""`orchestrator debug` as ranks that are forks of a process with everything imported: real ranks and real gloo without
seconds of importing for each; and hooks that watch a run or make it fail."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import pair_batch
from transformers import TrainerCallback

from orchestrator import cli
from orchestrator.data import refcache
from orchestrator.engines.ddp import DdpEngine
from orchestrator.models.logps import sequence_logps
from orchestrator.models.reference import Absent
from orchestrator.training.trainer import Trainer

Hook = Callable[[], None]
"""Called in each rank before it runs: a function of this module or a partial of one, as it travels by its name."""

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["orchestrator.cli", "orchestrator.run.debug", "transformers.models.qwen2.modeling_qwen2"]
FORKS.set_forkserver_preload([*IMPORTED, "accelerate", "bitsandbytes", "peft", "pytest"])
GRACE_S = 5.0  # seconds that other ranks get to end after one has failed
TIMEOUT_S = 120.0


class Ended(NamedTuple):
    """How each rank ended, and what all of them said."""

    codes: list[int]
    log: str


def run(settings: Path, *words: str, ranks: int = 1, hook: Hook | None = None) -> Ended:
    """`orchestrator debug SETTINGS WORDS...` on so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = settings.parent / f"{time.monotonic_ns()}.log"
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = [
        FORKS.Process(
            target=_rank,
            args=(log, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, ["debug", str(settings), *words], hook),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Ended(_codes(processes), log.read_text())


def finished(settings: Path, *words: str, ranks: int = 1, hook: Hook | None = None) -> str:
    """The same for a run that must come to its end; returns what it said."""
    ended = run(settings, *words, ranks=ranks, hook=hook)
    assert ended.codes == [0] * ranks, ended.log
    return ended.log


def _codes(processes: list[Any]) -> list[int]:
    """Wait for every rank; one that waits in vain for a rank that failed is ended."""
    deadline, failed = time.monotonic() + TIMEOUT_S, False
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode not in (None, cli.DONE, cli.STOPPED) for process in processes):
            failed, deadline = True, time.monotonic() + GRACE_S
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _rank(log: Path, env: dict[str, str], words: list[str], hook: Hook | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    if hook is not None:
        hook()
    code = cli.main(words)
    sys.stdout.flush()
    os._exit(code)


# --- hooks and callbacks -----------------------------------------------------------------------------------------


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


class KeepsLogps(TrainerCallback):
    """Writes what the trained policy, as it is in memory, says of PAIRS made-up pairs: [2B], fp64."""

    PAIRS = 6

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.eval()
        torch.save(sequence_logps(model, pair_batch(self.PAIRS, packed=True)), Path(args.output_dir, "logps.pt"))


def watch() -> None:
    """Write RUN_DIR/watched{rank}.jsonl: hashes of reference and policy before training or going on, and after each
    step."""
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

    def watched_update(trainer: Any, sums: torch.Tensor) -> None:
        after_update(trainer, sums)
        note(trainer)

    Trainer.fit, Trainer._after_update = watched_fit, watched_update


def sha256(*tensors: torch.Tensor) -> str:
    """Of their content."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def dies_filling(question: int) -> None:
    """SIGKILL at the so many-th question that a fill of the cache asks the reference, on every rank."""
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
