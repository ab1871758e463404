"""Identify what the results of a run depend on besides its settings and rows."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from orchestrator.data.tokens import tokenizer_identity
from orchestrator.engines.precision import dtype_held
from orchestrator.models.adapters import adapter_layers
from orchestrator.models.identity import identity_of
from orchestrator.models.mapped import types_when_cut
from orchestrator.models.reference import PolicyStart, Reference
from orchestrator.models.rope import fixed_up_to
from orchestrator.settings.model import AttentionName
from orchestrator.settings.run import RunSpec
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import PreparedRun


def run_identity(
    context: RunContext, prepared: PreparedRun, policy: Any, reference: Reference
) -> dict[str, Any]:
    """Return hashes of the models and the tokenizer; a checkpoint can only be resumed with the
    same. Collective.

    To be called before any forward pass, because bitsandbytes casts biases in one.
    """
    spec, world = context.spec, context.world
    types = _types_once_cut(spec, policy, dtype_held(context.precision))
    weights = identity_of(reference.tensors(), reference.model.config, world, types)
    identity: dict[str, Any] = {"reference": weights}
    # a reference that has no module of its own is the base
    if adapter_layers(policy) and reference.own_modules(policy):
        identity["base"] = identity_of(PolicyStart(policy).tensors(), policy.config, world, types)
    # a user's function may have frozen some: without it the same command would train them
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    names = hashlib.sha256("\n".join(trainable).encode()).hexdigest()
    identity["trainable"] = {"count": len(trainable), "names": names}
    return identity | tokenizer_hashes(spec, prepared.tokenizer)


def tokenizer_hashes(spec: RunSpec, tokenizer: Any) -> dict[str, Any]:
    """Return hashes of a tokenizer and its chat template, as in a run's identity."""
    template = str(tokenizer.chat_template).encode()
    hashes: dict[str, Any] = {"chat_template": hashlib.sha256(template).hexdigest()}
    # a new tokenizer depends on the rows, which have a hash too
    if spec.model.path or spec.model.tokenizer:
        hashes["tokenizer"] = tokenizer_identity(tokenizer)
    return hashes


def logps_identity(
    context: RunContext, reference: Reference, weights: dict[str, Any], attention: AttentionName
) -> dict[str, Any]:
    """Return what a reference's log-probs depend on besides the tokens. weights: their identity."""
    spec, precision = context.spec, context.precision
    identity: dict[str, Any] = {
        "reference": weights,
        "precision": precision,
        "attention": attention,
        "device": context.world.device.type,
    }
    if context.has_16_bit_weights:
        identity["weights"] = precision
    if spec.dpo.ld_alpha is not None:
        identity["ld_alpha"] = spec.dpo.ld_alpha
    if fixed_up_to(reference.model.config) is not None:
        identity["rope"] = "by each row's own length"  # earlier releases: by the longest row's
    return identity


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yield the differences of two nested dicts of plain values, with shortened hashes."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            inner = f"{key}.{name}" if key else name
            yield from differences(before.get(name), now.get(name), inner)
    elif before != now:
        old, new = (str(value)[:12] for value in (before, now))
        yield f"{key} (was {old}, now {new})"


def _types_once_cut(
    spec: RunSpec, policy: Any, dtype: torch.dtype
) -> dict[str, torch.dtype] | None:
    """Return the dtypes of weights that an engine will shard: mapped ones have that of their file
    until then.
    """
    has_base_dtype = spec.model.lora is not None and spec.model.lora.base
    if not spec.engine.shards_weights or has_base_dtype or spec.reference.dtype:
        return None
    return types_when_cut(policy, dtype)
