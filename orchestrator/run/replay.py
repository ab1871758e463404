"""A step of a run once more, in one process: from the newest checkpoint before it, with every pair of its batch."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.data.loader import StepBatches
from orchestrator.data.order import run_length
from orchestrator.data.sources import in_one_line
from orchestrator.dpo.losses import PairTerms, rewards
from orchestrator.dpo.step import StepOutput
from orchestrator.run.debug import joined
from orchestrator.run.prompt import debugger
from orchestrator.run.trial import NothingToSave, nowhere
from orchestrator.settings.counts import counted
from orchestrator.settings.load import load_spec
from orchestrator.settings.optimizers import optimizer_kind
from orchestrator.settings.spec import RunSpec, UserError, changed_on_resume
from orchestrator.training.checkpoint import Reader
from orchestrator.training.given import NOTHING, Given
from orchestrator.training.manifest import committed, step_of, verify
from orchestrator.training.prepare import prepare
from orchestrator.training.result import last_result
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer
from orchestrator.training.worker import built
from orchestrator.world import World, is_one_of_many

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplayedPair:
    """What the step made of one pair."""

    source: str
    row: int  # of the source, from 1
    loss: float
    rewards: tuple[float, float]  # of chosen and rejected, as are the following
    logps: tuple[float, float]
    ref_logps: tuple[float, float]
    prompt: str  # decoded from the tokens
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Replayed:
    """A step as it was before its update."""

    step: int
    found: Path | None  # the checkpoint it was made from; None: from the start of the run
    epoch: int  # from 0
    pairs: list[ReplayedPair]  # those without a finite loss first, then the largest loss
    loss: float  # mean over the global batch
    grad_norm: float  # L2, before clipping
    logged: dict[str, float]  # what metrics.jsonl has of this step alone


def replay(
    run_dir: RunDir,
    step: int,
    overrides: Sequence[str] = (),
    post_mortem: bool = False,
    given: Given = NOTHING,
) -> Replayed:
    """Take the steps between the newest whole checkpoint and `step`, and look at that one's forward and backward pass.

    Whatever engine and number of ranks the run has, this is one process. The run may go on meanwhile: it is only read,
    and no callback of it is called.

    overrides: key=value for settings that may change on resume.
    post_mortem: stop at a breakpoint before the step, and where an exception is raised.
    given: what the run was started with in Python; its callbacks are not called.

    Raises:
        UserError: the run has not come to that step, or cannot be gone on with from here.
        TrainingError: a step between cannot be taken.
    """
    if is_one_of_many():
        raise UserError("--replay-step", step, "is taken in one process", "start it without torchrun")
    spec = _spec_of(run_dir, overrides)
    _check_reached(run_dir, spec, step)
    with joined(spec, post_mortem) as world, debugger(world, post_mortem):
        prepared = prepare(spec, given)
        total = run_length(prepared.train.pairs_per_epoch, spec.batch.global_batch_size, spec.training).steps
        if step > total:
            raise UserError("--replay-step", step, f"the run has {counted(total, 'step')}", f"give 1 to {total}")
        found = _newest_before(run_dir, step)
        if found is not None:
            _check_readable(Reader(found).meta, step, world)
        _say(spec, step, found, world)
        with (
            nowhere(spec) as (bare, folder),
            built(bare, prepared, world, NothingToSave(), folder, given, found) as trainer,
        ):
            if trainer.loader.cache is not None:
                trainer.loader.cache.only_read()  # of the run, which may be running
            _check_epochs(run_dir, trainer.step, step)
            with closing(trainer.loader.steps(trainer.pairs_seen, trainer.step)) as steps:
                trainer.train(steps, upto=step - 1)
                if trainer.step < step - 1:
                    rule = f"training ended after step {trainer.step}"
                    raise UserError("--replay-step", step, rule, "give a step that was taken")
                made, outputs, grad_norm = _taken(trainer, steps, post_mortem)
            pairs = [
                pair
                for indices, (batch, output) in zip(made.indices, outputs, strict=True)
                for pair in _pairs(trainer, indices.tolist(), output, batch.completion_tokens)
            ]
            pairs.sort(key=lambda pair: (math.isfinite(pair.loss), -pair.loss))
            loss = sum(float(output.loss) for _, output in outputs)
            return Replayed(step, found, made.epoch, pairs, loss, grad_norm, _logged(run_dir, step))


def _say(spec: RunSpec, step: int, found: Path | None, world: World) -> None:
    taken = step_of(found) if found else 0
    where = found.name if found else "the start, as no checkpoint is older"
    redone = f"after {step - 1 - taken} redone from {where}"
    print(f"step {step} of {spec.run.name} on {world.device.type}, {redone}", flush=True)


def _taken(
    trainer: Trainer, steps: Iterator[StepBatches], stops: bool
) -> tuple[StepBatches, list[tuple[PairBatch, StepOutput]], float]:
    """The batches of the next step, what its forward pass gave, and the gradient's norm; batches that fp16 skipped come
    before it."""
    for skipped in count():
        made = next(steps)
        if stops:
            print("the next line is the step: `made` are its micro-batches, `trainer` is about to take it", flush=True)
            breakpoint()
        outputs = trainer.micro_steps(made)
        is_finite = bool(trainer.engine.finite())
        grad_norm = float(trainer.engine.optimizer_step(apply=False).grad_norm)
        if is_finite or trainer.precision != "fp16" or skipped == MAX_SKIPPED_IN_A_ROW:
            return made, outputs, grad_norm
    raise AssertionError  # a count has no end


def _pairs(trainer: Trainer, indices: list[int], output: StepOutput, tokens: torch.Tensor) -> Iterator[ReplayedPair]:
    """Of the pairs at these indices. tokens: [2B] of their completions."""
    tokenizer = trainer.callbacks.objects["processing_class"]
    split = PairTerms.split(output.logps.cpu(), output.ref_logps.cpu(), tokens.cpu())
    numbers = (output.losses, *rewards(split, trainer.spec.dpo), *split[:4])
    for index, loss, chosen, rejected, *logps in zip(indices, *(number.tolist() for number in numbers), strict=True):
        row = trainer.loader.pairs[index]
        texts = (tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        place = trainer.loader.pairs.place(row["pair_id"])
        yield ReplayedPair(place.source, place.row, loss, (chosen, rejected), (*logps[:2],), (*logps[2:],), *texts)


def lines(replayed: Replayed) -> Iterator[str]:
    """It, for a terminal: each pair with its numbers and, shortened, its text; then the step."""
    for pair in replayed.pairs:
        yield f"row {pair.row} of {pair.source}: loss {pair.loss:.6f}"
        yield f"  prompt   {in_one_line(pair.prompt)}"
        sides = zip(("chosen", "rejected"), pair.rewards, pair.logps, pair.ref_logps, strict=True)
        for name, reward, logps, ref_logps in sides:
            numbers = f"reward {reward:+.6f}, log-prob {logps:.4f}, of the reference {ref_logps:.4f}"
            yield f"  {name:<8} {numbers}\n           {in_one_line(getattr(pair, name))}"
    for name, value in (("loss", replayed.loss), ("grad_norm", replayed.grad_norm)):
        logged = f", logged as {replayed.logged[name]:.9f}" if name in replayed.logged else ""
        yield f"{name:<9} {value:.9f}{logged}"


# --- the run that is read ----------------------------------------------------------------------------------------


def _spec_of(run_dir: RunDir, overrides: Sequence[str]) -> RunSpec:
    """The run's settings, with what may change on resume changed.

    Raises:
        UserError: another setting would be changed.
    """
    spec = load_spec(run_dir.config, overrides)
    for key, old, new in changed_on_resume(load_spec(run_dir.config), spec):
        raise UserError(key, new, f"is {old!r} in the run, and its step would be another one", "remove it")
    return spec


def _check_reached(run_dir: RunDir, spec: RunSpec, step: int) -> None:
    """Refuse a step that the run cannot have come to; the one in which it died can be looked at."""
    ended = last_result(run_dir)
    if ended is not None:
        reached = ended.step
    else:
        saved = [step_of(folder) for folder in committed(run_dir.checkpoints)]
        logged = [int(line["step"]) + spec.training.logging_steps for line in _metrics(run_dir)]
        beats = [json.loads(path.read_text())["step"] for path in run_dir.logs.glob("heartbeat_*.json")]
        reached = max((1, *(taken + 1 for taken in saved + beats), *logged))
    if step > reached:
        rule = f"the run in {run_dir.path} has come to step {reached} at most"
        raise UserError("--replay-step", step, rule, f"give 1 to {reached}")


def _newest_before(run_dir: RunDir, step: int) -> Path | None:
    """The newest whole checkpoint of an earlier step."""
    for folder in committed(run_dir.checkpoints):
        if step_of(folder) >= step:
            continue
        if not (wrong := verify(folder)):
            return folder
        logger.warning("%s; an older checkpoint is used", wrong[0])
    return None


def _check_readable(meta: dict[str, Any], step: int, world: World) -> None:
    """Refuse a checkpoint whose optimizer state only as many ranks as wrote it can read."""
    name, ranks = meta["made_by"]["optimizer"], meta["world_size"]
    if optimizer_kind(name) != "elementwise" and ranks != world.size:
        rule = f"the state of {name} of {ranks} ranks cannot be read by one"
        raise UserError("--replay-step", step, rule, "replay a run of one rank, or of torch.optim.AdamW")


def _check_epochs(run_dir: RunDir, taken: int, step: int) -> None:
    """Refuse a step before which a callback has ended an epoch early: no callback is called here, to ask for it."""
    saved = committed(run_dir.checkpoints)
    ended = Reader(saved[0]).meta["epochs_ended"] if saved else []
    if cut := [after for after in ended if taken <= after < step]:
        rule = f"a callback ended an epoch after step {cut[0]}, and no checkpoint is between"
        raise UserError("--replay-step", step, rule, f"give one up to {cut[0]}")


def _metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    if not run_dir.metrics.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in run_dir.metrics.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, which is being written
            continue
    return [line for line in found if "loss" in line]


def _logged(run_dir: RunDir, step: int) -> dict[str, float]:
    """What was logged of this step; its loss only where no earlier step is in the mean."""
    of = {int(line["step"]): line for line in _metrics(run_dir)}
    names = ["grad_norm", *(["loss"] if step == 1 or step - 1 in of else [])]
    return {name: of[step][name] for name in names if step in of}
