"""Replay a step of a run in one process, and show every pair of its batch."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
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
from orchestrator.run.local.debug import joined
from orchestrator.run.local.prompt import debugger
from orchestrator.run.local.trial import NothingToSave, scratch_run
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec
from orchestrator.settings.optim import optimizer_kind
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.settings.run import RunSpec, changed_on_resume
from orchestrator.training.assemble import assembled
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.context import RunContext
from orchestrator.training.manifest import committed, step_of, verify
from orchestrator.training.prepare import PreparedRun, prepare
from orchestrator.training.result import last_result
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.world import World, is_one_of_many

logger = logging.getLogger(__name__)

Outputs = list[tuple[PairBatch, StepOutput]]
"""The micro-batches of a step and their outputs."""


@dataclass(frozen=True)
class ReplayedPair:
    """Results of the step for one pair."""

    source: str
    row: int  # in the source, counted from 1
    loss: float
    rewards: tuple[float, float]  # of chosen and rejected, like the next two
    logps: tuple[float, float]
    ref_logps: tuple[float, float]
    prompt: str  # decoded from the tokens
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ReplayResult:
    """Results of a step before its update."""

    step: int
    checkpoint: Path | None  # the one it started from; None: the start of the run
    epoch: int  # from 0
    pairs: list[ReplayedPair]  # those without a finite loss first, then the largest loss
    loss: float  # mean over the global batch
    grad_norm: float  # L2, before clipping
    logged: dict[str, float]  # values of only this step in metrics.jsonl


def replay(
    run_dir: RunDir,
    step: int,
    overrides: Sequence[str] = (),
    post_mortem: bool = False,
    user: UserObjects = NOTHING,
) -> ReplayResult:
    """Run the forward and backward pass of a step, from the newest complete checkpoint before it.

    This uses one process, whatever engine and number of ranks the run has. The run may continue
    meanwhile: it is only read, and its callbacks are not called.

    overrides: key=value for settings that may change on resume.
    post_mortem: stop at a breakpoint before the step, and when an exception is raised.
    user: objects with which the run was started in Python; callbacks are not called.

    Raises:
        UserError: the run has not reached that step, or cannot be resumed here.
        TrainingError: a step between cannot be run.
    """
    if is_one_of_many():
        raise UserError("--replay-step", step, "runs in one process", "start it without torchrun")
    spec = _run_settings(run_dir, overrides)
    _check_reached(run_dir, spec, step)
    with joined(spec, post_mortem) as world, debugger(world, post_mortem):
        prepared = prepare(spec, user)
        _check_within(spec, prepared, step)
        checkpoint = _newest_before(run_dir, step)
        if checkpoint is not None:
            _check_readable(Reader(checkpoint).meta, step, world)
        _print_start(spec, step, checkpoint, world)
        with scratch_run(spec) as (bare, folder):
            context = RunContext(bare, world, NothingToSave(), folder)
            with assembled(context, prepared, user, checkpoint) as trainer:
                if (cache := trainer.loaders.train.cache) is not None:
                    cache.only_read()  # it belongs to the run, which may be running
                _check_epochs(run_dir, trainer.progress.step, step)
                with closing(trainer.steps()) as steps:
                    _repeat_steps(trainer, steps, step - 1)
                    batches, outputs, grad_norm = _run_step(trainer, steps, post_mortem)
                pairs, loss = _replayed_pairs(trainer, batches, outputs)
    logged = _logged(run_dir, step)
    return ReplayResult(step, checkpoint, batches.epoch, pairs, loss, grad_norm, logged)


def _check_within(spec: RunSpec, prepared: PreparedRun, step: int) -> None:
    """Check that the run has the step at all."""
    per_epoch = prepared.train.pairs_per_epoch
    last = run_length(per_epoch, spec.batch.global_batch_size, spec.training).steps
    if step > last:
        rule = f"the run has {counted(last, 'step')}"
        raise UserError("--replay-step", step, rule, f"use 1 to {last}")


def _print_start(spec: RunSpec, step: int, checkpoint: Path | None, world: World) -> None:
    taken = step_of(checkpoint) if checkpoint else 0
    where = checkpoint.name if checkpoint else "the start, as there is no older checkpoint"
    repeated = f"after repeating {counted(step - 1 - taken, 'step')} from {where}"
    print(f"step {step} of {spec.run.name} on {world.device.type}, {repeated}", flush=True)


def _repeat_steps(trainer: Trainer, steps: Iterator[StepBatches], last: int) -> None:
    """Train up to the step before the one to replay."""
    trainer.train(steps, upto=last)
    if trainer.progress.step < last:
        rule = f"training ended after step {trainer.progress.step}"
        raise UserError("--replay-step", last + 1, rule, "use a step of the run")


def _run_step(
    trainer: Trainer, steps: Iterator[StepBatches], stops: bool
) -> tuple[StepBatches, Outputs, float]:
    """Run the forward and backward pass of the next step, after batches that fp16 skips.

    Returns its batches, its outputs and the gradient norm. stops: at a breakpoint before it.
    """
    scales_loss = PRECISION_TRAITS[trainer.context.precision].scales_loss
    for skipped in count():
        batches = next(steps)
        if stops:
            names = "`batches` are its micro-batches, `trainer` is the trainer"
            print(f"the next line runs the step: {names}", flush=True)
            breakpoint()
        outputs = trainer.forward_backward(batches)
        is_finite = bool(trainer.engine.grads_finite())
        grad_norm = float(trainer.engine.optimizer_step(apply=False).grad_norm)
        if is_finite or not scales_loss or skipped == MAX_SKIPPED_IN_A_ROW:
            return batches, outputs, grad_norm
    raise AssertionError  # not reached: count() is endless


def _replayed_pairs(
    trainer: Trainer, batches: StepBatches, outputs: Outputs
) -> tuple[list[ReplayedPair], float]:
    """Return the pairs of a step, the worst first, and its loss."""
    pairs = [
        pair
        for indices, (batch, output) in zip(batches.indices, outputs, strict=True)
        for pair in _pairs_of_batch(trainer, indices.tolist(), output, batch.completion_tokens)
    ]
    pairs.sort(key=lambda pair: (math.isfinite(pair.loss), -pair.loss))
    return pairs, sum(float(output.loss) for _, output in outputs)


def _pairs_of_batch(
    trainer: Trainer, indices: list[int], output: StepOutput, tokens: torch.Tensor
) -> Iterator[ReplayedPair]:
    """Yield the results of the pairs at these indices. tokens: [2B] tokens of their completions."""
    tokenizer, pairs = trainer.callbacks.objects["processing_class"], trainer.loaders.train.pairs
    split = PairTerms.split(output.logps.cpu(), output.ref_logps.cpu(), tokens.cpu())
    numbers = (output.losses, *rewards(split, trainer.context.spec.dpo), *split[:4])
    lists = (number.tolist() for number in numbers)
    for index, loss, chosen, rejected, *logps in zip(indices, *lists, strict=True):
        row = pairs[index]
        texts = (tokenizer.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        place = pairs.place(row["pair_id"])
        yield ReplayedPair(
            place.source, place.row, loss, (chosen, rejected), (*logps[:2],), (*logps[2:],), *texts
        )


def replay_lines(replayed: ReplayResult) -> Iterator[str]:
    """Yield lines for a terminal: each pair with its numbers and shortened texts, then the step."""
    for pair in replayed.pairs:
        yield f"row {pair.row} of {pair.source}: loss {pair.loss:.6f}"
        yield f"  prompt   {in_one_line(pair.prompt)}"
        sides = zip(("chosen", "rejected"), pair.rewards, pair.logps, pair.ref_logps, strict=True)
        for name, reward, logps, ref_logps in sides:
            numbers = f"reward {reward:+.6f}, log-prob {logps:.4f}, reference {ref_logps:.4f}"
            yield f"  {name:<8} {numbers}\n           {in_one_line(getattr(pair, name))}"
    for name, value in (("loss", replayed.loss), ("grad_norm", replayed.grad_norm)):
        logged = f", logged as {replayed.logged[name]:.9f}" if name in replayed.logged else ""
        yield f"{name:<9} {value:.9f}{logged}"


# --- the run that is read -------------------------------------------------------------------------


def _run_settings(run_dir: RunDir, overrides: Sequence[str]) -> RunSpec:
    """Return the run's settings with overrides of those that may change on resume.

    Raises:
        UserError: an override changes another setting.
    """
    settings = run_dir.settings()
    spec = load_spec(settings, overrides)
    for key, old, new in changed_on_resume(load_spec(settings), spec):
        raise UserError(key, new, f"is {old!r} in the run, so the step would differ", "remove it")
    return spec


def _check_reached(run_dir: RunDir, spec: RunSpec, step: int) -> None:
    """Check that the run can have reached the step; the step in which it died is allowed."""
    ended = last_result(run_dir)
    if ended is not None:
        reached = ended.step
    else:
        saved = [step_of(folder) for folder in committed(run_dir.checkpoints)]
        logged = [
            int(line["step"]) + spec.training.logging_steps for line in _training_lines(run_dir)
        ]
        heartbeats = run_dir.logs.glob("heartbeat_*.json")
        taken = saved + [step for path in heartbeats for step in _step_in(path)]
        reached = max((1, *(each + 1 for each in taken), *logged))
    if step > reached:
        rule = f"the run in {run_dir.path} has reached at most step {reached}"
        raise UserError("--replay-step", step, rule, f"use 1 to {reached}")


def _step_in(heartbeat: Path) -> list[int]:
    """Return the step in a heartbeat file; empty if it is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [int(json.loads(heartbeat.read_text())["step"])]
    return []


def _newest_before(run_dir: RunDir, step: int) -> Path | None:
    """Return the newest complete checkpoint of an earlier step, or None."""
    for folder in committed(run_dir.checkpoints):
        if step_of(folder) >= step:
            continue
        if not (problems := verify(folder)):
            return folder
        logger.warning("%s; an older checkpoint is used", problems[0])
    return None


def _check_readable(meta: dict[str, Any], step: int, world: World) -> None:
    """Check that one rank can read the optimizer state of a checkpoint."""
    name, ranks = meta["made_by"]["optimizer"], meta["world_size"]
    if optimizer_kind(name) != "elementwise" and ranks != world.size:
        rule = f"one rank cannot read the state of {name} of {ranks} ranks"
        cure = "replay a run with one rank, or with torch.optim.AdamW"
        raise UserError("--replay-step", step, rule, cure)


def _check_epochs(run_dir: RunDir, taken: int, step: int) -> None:
    """Check that no callback ended an epoch early since the checkpoint: a replay calls none."""
    saved = committed(run_dir.checkpoints)
    ended = Reader(saved[0]).meta["epochs_ended"] if saved else []
    if cut := [after for after in ended if taken <= after < step]:
        rule = f"a callback ended an epoch after step {cut[0]}, and there is no checkpoint since"
        raise UserError("--replay-step", step, rule, f"use a step up to {cut[0]}")


def _training_lines(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that log training."""
    return [line for line in run_dir.metric_lines() if "loss" in line]


def _logged(run_dir: RunDir, step: int) -> dict[str, float]:
    """Return the logged values of this step.

    Its loss is among them only if the logged mean contains no earlier step.
    """
    lines = {int(line["step"]): line for line in _training_lines(run_dir)}
    names = ["grad_norm", *(["loss"] if step == 1 or step - 1 in lines else [])]
    return {name: lines[step][name] for name in names if step in lines}
