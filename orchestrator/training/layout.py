"""Choose the layout of rows, packed or padded, and check that the models compute the same in it."""

from functools import partial
from typing import Any, NamedTuple

import torch

from orchestrator.data.order import fed_lengths, longest_sequences
from orchestrator.engines.base import Engine
from orchestrator.models.attention import choose_kernel, not_exact, use_packed_attention
from orchestrator.models.layout_check import packed_error, padding_error
from orchestrator.models.quantized import is_quantized
from orchestrator.models.rope import fixed_up_to, use_own_lengths
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import AttentionName
from orchestrator.settings.precision import Precision
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import PreparedRun

# Largest packed_error that counts as rounding.
PACKED_TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 0.02, "bf16": 0.05, "fp16": 0.02}


class Layout(NamedTuple):
    """The attention of policy and reference."""

    attention: AttentionName
    why_padded: str | None = None  # a reason that the settings do not state


def choose_layout(context: RunContext, prepared: PreparedRun, engine: Engine) -> Layout:
    """Set the attention of policy and reference to one for which packed rows are exact, if there is
    one. Collective.

    Raises:
        UserError: the rows are padded, and the model's output for one depends on the others.
    """
    spec, world, precision = context.spec, context.world, context.precision
    longest = _longest(prepared, spec.data.keep_last)
    models = _models(engine)
    for model in models:
        if longest > (fixed_up_to(model.config) or longest):
            use_own_lengths(model)
    if prepared.collator is not None or spec.model.attention == "padded":
        _check_padding(models, engine, context)
        return Layout("padded")
    kernel = choose_kernel(spec.model.attention, world.device, precision)
    for model in models:
        if reason := not_exact(model.config, longest):
            _check_padding(models, engine, context)
            return Layout("padded", reason)
    errors: list[float] = []
    for name in dict.fromkeys((kernel, "sdpa")):
        for model in models:
            use_packed_attention(model, name)
        mine = [
            engine.run_in_forward(partial(packed_error, model, world.device))
            / _tolerance(model, precision)
            for model in models
        ]
        # all ranks must have one layout, which decides the number of micro-steps; NaN exceeds every
        # tolerance
        errors = [error for of_rank in world.gather(mine) for error in of_rank]
        if all(error <= 1 for error in errors):
            return Layout(name)
    return Layout(
        "padded", f"packed and padded rows differ by {max(errors):.1e} times the rounding"
    )


def _longest(prepared: PreparedRun, keep_last: int | None) -> int:
    """Return the tokens of the longest sequence of all sets."""
    sets = (prepared.train, *prepared.eval.values())
    lengths = [fed_lengths(pairs.lengths, keep_last) for pairs in sets]
    return max(int(longest_sequences(each).max()) for each in lengths)


def _models(engine: Engine) -> list[Any]:
    """Return the models that run on rows, each once."""
    policy, reference = engine.step.policy, engine.step.reference
    judges = [reference.model] + ([reference.exact.model] if reference.exact is not None else [])
    return [model for model in dict.fromkeys((policy, *judges)) if model is not None]


def _check_padding(models: list[Any], engine: Engine, context: RunContext) -> None:
    """Check that a sequence's log-probs do not depend on its padding. Collective."""
    for model in models:
        error = engine.run_in_forward(partial(padding_error, model, context.world.device))
        error /= _tolerance(model, context.precision)
        if not max(context.world.gather(error)) <= 1:
            rule = (
                "log-probs of a sequence depend on the rows beside it: they differ by "
                f"{error:.1e} times the rounding"
            )
            raise UserError("model", type(model).__name__, rule, "use another model")


def _tolerance(model: Any, precision: Precision) -> float:
    is_coarse = is_quantized(model) or model.dtype in (torch.bfloat16, torch.float16)
    return PACKED_TOLERANCE["bf16" if is_coarse else precision]
