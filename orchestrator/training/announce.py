"""Print data, models, ranks and dtypes on rank 0 before the first step."""

from contextlib import nullcontext
from typing import Any

import torch

from orchestrator.data.order import longest_sequences, run_length
from orchestrator.data.pairs import Pairs
from orchestrator.data.repeats import repeat_lines
from orchestrator.data.shapes import note_lines
from orchestrator.engines.base import Engine
from orchestrator.engines.precision import is_16_bit
from orchestrator.models.dtypes import dtype_name
from orchestrator.models.layers import head_is_tied
from orchestrator.models.quantized import is_int8, is_quantized
from orchestrator.models.reference import Reference
from orchestrator.settings.counts import counted
from orchestrator.settings.notes import Known, notes
from orchestrator.settings.precision import PRECISION_TRAITS, Precision
from orchestrator.settings.run import RunSpec
from orchestrator.training.compute_metrics import UserMetrics, bytes_together
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import PreparedRun, named_sets
from orchestrator.world import World


def print_run(
    context: RunContext, prepared: PreparedRun, max_steps: int, why_padded: str | None
) -> None:
    """Print the data, the ranks, the length of the run and notes on its settings."""
    spec, world = context.spec, context.world
    for name, pairs in named_sets(prepared.train, prepared.eval):
        _print_set(spec, prepared, name, pairs)
    for line in repeat_lines(prepared.train, prepared.eval):
        print(line, flush=True)
    if prepared.user_metrics is not None:
        _print_metrics(spec, prepared, prepared.user_metrics)
    engine = f" under {spec.engine.label}" if spec.engine.label else ""
    where = f"{counted(world.size, 'rank')} on {world.device.type} in {context.precision}{engine}"
    batch, steps = counted(spec.batch.global_batch_size, "pair"), counted(max_steps, "step")
    print(f"{where}, {batch} a step, {steps}", flush=True)
    has_weights = any(share.per_epoch != share.pairs for share in prepared.train.shares)
    if spec.reference_cache == "lazy" and has_weights:
        cached = "reference log-probs are cached only with reference.cache=full"
        print(f"training sets have weights: {cached}; the reference runs in every step")
    positions = getattr(prepared.config.get_text_config(), "max_position_embeddings", None)
    per_epoch, gpus = prepared.train.pairs_per_epoch, torch.cuda.device_count()
    epochs = run_length(per_epoch, spec.batch.global_batch_size, spec.training).epochs
    for line in notes(spec, Known(max_steps, per_epoch, epochs, positions, gpus)):
        print(f"note: {line}", flush=True)
    if why_padded is not None:
        print(f"two padded rows per pair instead of a packed one: {why_padded}", flush=True)


def _print_set(spec: RunSpec, prepared: PreparedRun, name: str, pairs: Pairs) -> None:
    """Print the size of a data set, and what of its rows is dropped, unused or too long."""
    dropped = "".join(f", {count} dropped ({reason})" for reason, count in pairs.dropped.items())
    bring = (f"; rows with {variable}: {rows}" for variable, rows in pairs.unread.items())
    unread = "".join(f"{each}, not used by the chat template" for each in bring)
    size = f"{counted(len(pairs), f'{name} pair')}, {counted(int(pairs.lengths.sum()), 'token')}"
    print(f"{size}{dropped}{unread}", flush=True)
    for line in note_lines(pairs.unread_columns, pairs.notes):
        print(f"  {line}", flush=True)
    for each, share in zip(pairs.sets, pairs.shares, strict=True):
        if len(pairs.sets) > 1 or share.per_epoch != share.pairs:
            per_epoch = f"{share.per_epoch} per epoch"
            print(f"  {each.source}: {counted(share.pairs, 'pair')}, {per_epoch}", flush=True)
    if prepared.collator is not None and spec.data.keep_last is not None:
        long = int((longest_sequences(pairs.lengths) > spec.data.keep_last).sum())
        longer = f"{long} of them, which are longer than data.max_length"
        print(f"{prepared.collator.name} must truncate {longer}")


def _print_metrics(spec: RunSpec, prepared: PreparedRun, user: UserMetrics) -> None:
    """Print what a user's compute_metrics receives, or the memory of its logits."""
    if not user.logits:
        columns = "log-probs, rewards and lengths of pairs"
        print(f"{user.name} receives {columns}; evaluation.logits=true: logits, as in TRL")
    elif not user.batched:
        vocabulary = prepared.config.get_text_config().vocab_size
        sizes = (bytes_together(user, each, vocabulary, spec) for each in prepared.eval.values())
        size = f"{max(sizes) / 2**20:,.1f} MB"
        print(f"each evaluation gathers {size} of logits in the memory of rank 0", flush=True)


def print_types(engine: Engine, precision: Precision) -> None:
    """Print the dtypes of weights, arithmetic, gradients, optimizer state and reference in one
    line.
    """
    types, step, judge = engine.types, engine.step, engine.step.reference
    own = [p for module in judge.own_modules(step.policy) for p in module.parameters()]
    if not own:
        reference = "same as policy"
    else:
        held = (
            "int8"
            if is_int8(judge.model)
            else "nf4"
            if is_quantized(judge.model)
            else dtype_name(own[0].dtype)
        )
        casts = is_16_bit(precision) and (
            types.arithmetic != precision or step.reference_arithmetic is not nullcontext
        )
        reference = f"{held}, arithmetic {precision} by autocast" if casts else held
    traits = PRECISION_TRAITS[precision]
    print(
        f"types: weights {types.weights}, arithmetic {types.arithmetic}, gradients "
        f"{types.gradients}, optimizer state {types.state}; softmax {traits.weights}, log-probs "
        f"and loss summed in fp64; reference {reference}; "
        f"TF32 {'on' if traits.uses_tf32 else 'off'}",
        flush=True,
    )


def print_models(
    spec: RunSpec, prepared: PreparedRun, policy: Any, reference: Reference, kind: str, world: World
) -> None:
    """Print the number of trainable parameters and the memory of the reference."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    own = reference.own_bytes(policy) / 2**20
    if spec.reference.sharded:
        own = (
            sum(p.nbytes for m in reference.own_modules(policy) for p in m.parameters())
            / 2**20
            / world.size
        )
    where = "of host memory" if spec.reference.offload else "of memory"
    print(f"{trained:,} trainable parameters; reference: {kind}, ", end="")
    print(
        "freed before the first step"
        if spec.reference.traits.is_precomputed
        else f"{own:.3g} MB {where} on each rank"
    )
    if (
        getattr(prepared.config, "tie_word_embeddings", False)
        and not policy.config.tie_word_embeddings
    ):
        print(
            "output head untied from the frozen embeddings: it now has its own, trainable weights"
        )
    elif getattr(policy.config, "tie_word_embeddings", False) and not head_is_tied(policy):
        print(
            "the weights have a separate output head, although the config ties it to the "
            "embeddings: both train,"
        )
        print("and the exported config has tie_word_embeddings: false")
    if type(policy.config) is not type(prepared.config):
        kind, text = prepared.config.model_type, type(policy).__name__
        print(
            f"{kind}: only its language model ({text}) is loaded, trained and exported, without "
            "its other parts"
        )


def print_frozen(names: list[str]) -> None:
    """Print which parameters were frozen because they get no gradient from text."""
    if names:
        modules = sorted({".".join(name.split(".")[:2]) for name in names})
        print(
            f"frozen: {len(names)} parameters without a gradient from text, in "
            f"{', '.join(modules)}",
            flush=True,
        )
