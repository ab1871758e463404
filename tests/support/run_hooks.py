"""Functions that ranks call before they run: they watch the run or make it fail."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from orchestrator.data import refcache, tokenize_rows
from orchestrator.dpo import step as dpo_step
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.deepspeed import DeepSpeedEngine
from orchestrator.engines.fsdp import FsdpEngine
from orchestrator.engines.stepping import SteppingEngine
from orchestrator.models.reference import Absent
from orchestrator.training import checkpoint_writer, ledger, samples
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.manifest import step_folder
from orchestrator.training.stops import LOOK_S
from orchestrator.training.trainer import Trainer


def watch() -> None:
    """Write RUN_DIR/watched{rank}.jsonl: hashes of reference and policy before training or going
    on, and after each step.
    """
    fit, count_step = Trainer.fit, Trainer._count_step

    def note(trainer: Any) -> None:
        step = trainer.engine.step
        reference = None if isinstance(step.reference, Absent) else step.reference.tensors()
        line = {
            "step": trainer.progress.step,
            "reference": reference and sha256(*(value for _, value in sorted(reference.items()))),
            "policy": {name: sha256(p) for name, p in step.policy.named_parameters()},
        }
        context = trainer.context
        with open(context.run_dir.path / f"watched{context.world.rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def watched_fit(trainer: Any) -> Any:
        note(trainer)
        return fit(trainer)

    def watched_update(trainer: Any, batches: Any, outputs: Any) -> Any:
        due = count_step(trainer, batches, outputs)
        note(trainer)
        return due

    Trainer.fit, Trainer._count_step = watched_fit, watched_update


def notes_pairs() -> None:
    """Write RUN_DIR/given{rank}.jsonl: what each batch gave of each of its pairs, and whether its
    step was skipped. The loss scale of fp16 is too large at first.
    """
    forward_backward, optimizer_step = Trainer.forward_backward, DdpEngine.optimizer_step
    values: list[dict[str, Any]] = []
    notes: list[Path] = []

    def noted(trainer: Any, value: Any) -> Any:
        if trainer.engine.scale.enabled and not trainer.progress.pairs_seen:
            trainer.engine.scale.value = 2.0**24
        outputs = forward_backward(trainer, value)
        for batch, output in outputs:
            columns = {"pair_id": batch.pair_ids, "loss": output.losses}
            for name, both in (("", output.logps), ("ref_", output.ref_logps)):
                columns[f"{name}chosen_logps"], columns[f"{name}rejected_logps"] = both.chunk(2)
            for i in batch.pair_weights.nonzero().flatten().tolist():
                values.append(
                    {
                        "step": trainer.progress.step + 1,
                        **{name: column[i].item() for name, column in columns.items()},
                    }
                )
        notes[:] = [trainer.context.run_dir.path / f"given{trainer.context.world.rank}.jsonl"]
        return outputs

    def write_pairs(engine: Any, apply: bool) -> Any:
        with open(notes[0], "a") as file:
            file.writelines(json.dumps({**pair, "skipped": not apply}) + "\n" for pair in values)
        values.clear()
        return optimizer_step(engine, apply)

    Trainer.forward_backward, DdpEngine.optimizer_step = noted, write_pairs


def sha256(*tensors: torch.Tensor) -> str:
    """Return the hash of their content."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def at_step(step: int, number: int) -> None:
    """Every rank sends itself a signal when it has taken that step."""
    count_step = Trainer._count_step

    def interrupted(trainer: Any, batches: Any, outputs: Any) -> Any:
        due = count_step(trainer, batches, outputs)
        if trainer.progress.step == step:
            os.kill(os.getpid(), number)
        return due

    Trainer._count_step = interrupted


def dies_filling(question: int) -> None:
    """SIGKILL at the so many-th question that a fill of the cache asks the reference, on every
    rank.
    """
    ask, requests = DdpEngine.reference_logps, count(1)

    def dying(engine: Any, batch: Any) -> torch.Tensor:
        if next(requests) == question:
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


Stage = tuple[Any, str, Callable[..., bool], str]
"""Owner and name of a function, whether a call of it is the one, and when in it to die."""


def stages_of_a_save(step: int) -> dict[str, Stage]:
    """Return the stages of the save of a step at which a rank may die."""

    def is_file(start: str) -> Callable[..., bool]:
        def is_it(*args: Any) -> bool:
            path = next(arg for arg in args if isinstance(arg, Path))
            return path.name.startswith(start) and f"step_{step:08d}" in path.parent.name

        return is_it

    return {
        "begun": (
            checkpoint_writer._Draft,
            "write",
            lambda draft, *_: draft.step == step,
            "before",
        ),
        "half written": (checkpoint_writer, "save_tensors", is_file("rank_"), "in the middle"),
        "written": (checkpoint_writer, "synced_sha256", is_file("rank_"), "before"),
        "rows half written": (checkpoint_writer, "write_rows", is_file("pairs_"), "in the middle"),
        "part begun": (
            ledger,
            "write_rows",
            lambda _, path: path.name.startswith(".steps_"),
            "in the middle",
        ),
        "part made": (ledger, "sync_folder", lambda _: True, "after"),
        # in the background alone
        "recorded": (checkpoint_writer, "write_atomically", is_file("rank_"), "after"),
        "complete": (checkpoint_writer, "synced_sha256", is_file("meta.json"), "after"),
        "renamed": (checkpoint_writer, "write_atomically", is_file("manifest.json"), "before"),
        "committed": (
            checkpoint_writer,
            "retain",
            lambda folder, *_: step_folder(folder, step).exists(),
            "before",
        ),
    }


def dies_saving(stage: str, rank: int, step: int) -> None:
    """SIGKILL at a stage of the save of a step, on one rank.

    Every save makes a part of the ledger's tail.
    """
    ledger.PART_ROWS = 1
    if int(os.environ["RANK"]) != rank:
        return

    home, name, is_due, when = stages_of_a_save(step)[stage]
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
    write = checkpoint_writer._Draft.write

    def full(draft: Any, *args: Any) -> Any:
        if (draft.world.rank, draft.step) == (rank, step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(draft, *args)

    checkpoint_writer._Draft.write = full


def slow_saves(seconds: float) -> None:
    """Every rank takes its time to write its part of a checkpoint."""
    write = checkpoint_writer._Draft.write

    def slow(draft: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return write(draft, *args)

    checkpoint_writer._Draft.write = slow


def no_locks() -> None:
    """Let every process get every lock, as on a file system that does not pass them on."""
    fcntl.flock = lambda *_: None


def breaks_numbers(what: str, value: float, rank: int, batches: tuple[int, ...]) -> None:
    """Make a number of these batches (counted from 1, skipped ones too) not finite on one rank:
    the loss of its first pair, its gradient, or a weight after the update.
    """
    forward_backward, pair_losses = Trainer.forward_backward, dpo_step.pair_losses
    update, numbers = SteppingEngine.optimizer_step, count(1)
    state = {"number": 0, "in step": False}

    def is_due(kind: str) -> bool:
        is_rank = int(os.environ.get("RANK", "0")) == rank
        return kind == what and is_rank and state["number"] in batches

    def counted_step(trainer: Any, batch: Any) -> Any:
        state.update({"number": next(numbers), "in step": True})
        outputs = forward_backward(trainer, batch)
        state["in step"] = False
        return outputs

    def broken_losses(*args: Any) -> torch.Tensor:
        losses = pair_losses(*args)
        if is_due("loss") and state["in step"]:
            factors = torch.ones_like(losses)
            factors[0] = value
            losses = losses * factors
        return losses

    def broken_gradients(engine: Any) -> list[torch.Tensor]:
        parts = gradients_of[type(engine)](engine)
        if is_due("gradient"):
            for part in parts:
                part.fill_(value)
        return parts

    def broken_update(engine: Any, apply: bool) -> Any:
        result = update(engine, apply)
        if is_due("weight"):
            with torch.no_grad():
                next(part for part in engine._fragments() if part.is_mine).weight.fill_(value)
                engine._after_loading()
        return result

    gradients_of = {kind: kind._gradients for kind in (DdpEngine, FsdpEngine, DeepSpeedEngine)}
    for kind in gradients_of:
        kind._gradients = broken_gradients
    Trainer.forward_backward, dpo_step.pair_losses = counted_step, broken_losses
    SteppingEngine.optimizer_step = broken_update


PHASES: dict[str, tuple[Any, str]] = {
    "tokenise": (tokenize_rows.RowTokenizer, "_tokenized"),
    "fill": (SteppingEngine, "reference_logps"),
    "evaluate": (SteppingEngine, "evaluate"),
    "export": (Reader, "parameter"),
    "samples": (samples, "_never"),
}
"""Owner and name of a function that is called for each piece of work of a phase."""


def signalled(phase: str, call: int, number: int, rank: int | None = 0) -> None:
    """A rank (None: each) sends itself a signal in the so many-th call of a phase.

    number: 0 for a file STOP in the folder that the environment variable STOPPED_RUN names.
    """
    if rank not in (None, int(os.environ["RANK"])):
        return
    home, name = PHASES[phase]
    function, calls = getattr(home, name), count(1)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            if number:
                os.kill(os.getpid(), number)
            else:
                Path(os.environ["STOPPED_RUN"], "STOP").touch()
            time.sleep(1.5 * LOOK_S)  # the next look is due
        return function(*args, **kwargs)

    setattr(home, name, watched)
