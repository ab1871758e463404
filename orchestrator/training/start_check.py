"""Check the reference before training: the error of an approximate one, and that a policy that
starts as its reference has the same log-probs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.data.loader import Loader
from orchestrator.dpo.step import StepOutput
from orchestrator.engines.base import Engine
from orchestrator.engines.precision import autocast
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.quantized import is_int8
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.settings.precision import Precision
from orchestrator.training.context import RunContext
from orchestrator.world import World

MEASURED = 4  # micro-batches of the first step on each rank that are compared

# Random error, in nats, of a token's log-prob that was cached with another split into micro-batches
# (for a sequence, times the square root of its tokens); in int8 the outliers of a whole micro-batch
# are treated alike.
SAME_LOGPS = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 0.03, "bf16": 0.1, "fp16": 0.03, "int8": 0.5}


class Tolerance(NamedTuple):
    """The difference up to which two log-probs count as equal."""

    token: float  # nats, random error of each token
    nats: float  # nats, additional error of a sequence


class LogpError(NamedTuple):
    """The error of an approximate reference."""

    pairs: int  # compared, over all ranks
    largest: float  # of a sequence's log-prob, in nats
    mean: float  # over sequences, in nats
    margin: float  # largest of a pair's log-ratio (chosen minus rejected), in nats


def start_tolerance(context: RunContext, engine: Engine, loader: Loader) -> Tolerance | None:
    """Return the tolerance for a policy that starts as its reference; None if it does not.
    Collective.

    Measure and print the error of an approximate reference, and free what it approximates.

    Raises:
        UserError: the error exceeds reference.max_reward_error.
    """
    spec, reference = context.spec, engine.step.reference
    is_same = reference.is_start and spec.model.disable_dropout
    rounding = _rounding(engine.step.policy, context.precision)
    if not spec.reference.is_approximate:
        return Tolerance(rounding, 0.0) if is_same else None

    def exact(batch: PairBatch) -> torch.Tensor:
        if reference.exact is None:  # the reference approximates the policy
            return engine.evaluate(batch, Counts(1, 1)).logps
        with autocast(context.world.device, context.precision):
            return reference.exact.logps(batch)

    error = reference_error(engine, loader, exact, context.world)
    _check_error(context, error)
    # twice: the error depends on the rest of a micro-batch
    return Tolerance(rounding, 2 * error.largest) if is_same else None


def reference_error(
    engine: Engine, loader: Loader, exact: Callable[[PairBatch], torch.Tensor], world: World
) -> LogpError:
    """Compare the reference with `exact` (batch -> [2B]) on the first pairs of training.
    Collective.
    """
    mine: list[list[float]] = []
    for batch in loader.first()[:MEASURED]:
        on_device = batch.to(world.device)
        # fillers run too: the forward pass may be collective
        errors = (engine.reference_logps(on_device) - exact(on_device)).view(2, -1).t()
        mine += errors[batch.pair_weights.to(errors.device) > 0].tolist()
    of_pairs = [pair for of_rank in world.gather(mine) for pair in of_rank]
    errors = torch.tensor(of_pairs, dtype=torch.float64)
    sequences, margins = errors.abs(), (errors[:, 0] - errors[:, 1]).abs()
    return LogpError(
        len(errors), sequences.max().item(), sequences.mean().item(), margins.max().item()
    )


def check_start(
    context: RunContext,
    outputs: Sequence[tuple[PairBatch, StepOutput]],
    tolerance: Tolerance,
    by_user: bool,
) -> None:
    """Check that the policy equals its reference before the first update, where every reward is 0
    and the sigmoid loss ln 2. Collective.

    outputs: the micro-batches of this rank, on the host, with their outputs.
    by_user: log-probs in a batch may be the user's, and are not compared.

    Raises:
        TrainingError: it does not.
    """
    world = context.world
    compared = [
        (batch, output)
        for batch, output in outputs
        if batch.pair_weights.any() and not (by_user and batch.ref_logps is not None)
    ]
    apart = [torch.zeros(1, dtype=torch.float64, device=world.device)]
    for batch, output in compared[:MEASURED]:
        rounding = tolerance.token * batch.completion_tokens.to(world.device).double().sqrt()
        apart.append((output.logps - output.ref_logps).abs() - rounding)
    worst = world.max(torch.cat(apart).amax().view(1)).item()
    if worst > tolerance.nats:  # False for NaN, which is detected in the gradient
        cache = context.spec.cache_dir / "reference_logps"
        raise TrainingError(
            f"step 1: the policy starts as its reference, but their log-probs differ by "
            f"{worst:.2g} nats more than by rounding ({tolerance.nats:.2g} are allowed); remove "
            f"{cache} in case it was edited, and report it if it persists"
        )


def _rounding(policy: Any, precision: Precision) -> float:
    """Return the random error, in nats, of a token's log-prob under the policy."""
    held: list[str] = [name for name, dtype in DTYPES.items() if policy.dtype == dtype]
    if is_int8(policy):
        held.append("int8")
    return max(SAME_LOGPS[name] for name in (precision, *held))


def _check_error(context: RunContext, error: LogpError) -> None:
    """Print the error of an approximate reference, and check it against the settings' limit."""
    spec = context.spec
    held, limit = spec.reference.dtype or spec.reference.kind, spec.reference.max_reward_error
    margin = spec.dpo.beta * error.margin
    if context.world.is_main:
        print(
            f"reference in {held}: log-probs of {counted(error.pairs, 'pair')} differ from "
            f"{context.precision} by at most {error.largest:.2g} nats, {error.mean:.2g} on "
            f"average; reward margins by at most {margin:.2g}",
            flush=True,
        )
    if limit is not None and not margin <= limit:
        rule = f"the reference in {held} changes reward margins by up to {margin:.2g}"
        cure = "raise it, or use a reference with more bits"
        raise UserError("reference.max_reward_error", limit, rule, cure)
