"""Build the parts of a run on a rank, in reading order: models, engine, data, caches, trainer."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.callback_api import TrainerCallback
from orchestrator.data.collate import Counts, PackedCollator, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import RunLength, run_length
from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import Engine
from orchestrator.engines.build import engine_class
from orchestrator.engines.optim import Optimizers, ReadOnlyOptimizer, factories
from orchestrator.engines.precision import autocast, dtype_held, dtype_of, tf32_switched
from orchestrator.models.behaviour import freeze_unreached
from orchestrator.models.build_reference import build_reference
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.policy import build_policy, pair_cost
from orchestrator.models.quantized import exact_int8_products
from orchestrator.models.reference import Reference
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.training.announce import print_frozen, print_models, print_run, print_types
from orchestrator.training.callbacks.handler import Callbacks
from orchestrator.training.callbacks.training_args import training_args
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.context import RunContext
from orchestrator.training.export import check_exportable
from orchestrator.training.export_files import exported_config, keep_for_export
from orchestrator.training.layout import choose_layout
from orchestrator.training.loaders import build_loaders, our_collator
from orchestrator.training.prepare import PreparedRun
from orchestrator.training.reference_cache import fill_caches, open_caches
from orchestrator.training.rng import seed_everything
from orchestrator.training.run_identity import logps_identity, run_identity
from orchestrator.training.start_check import start_tolerance
from orchestrator.training.trainer import Trainer
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.world import World


@contextmanager
def assembled(
    context: RunContext,
    prepared: PreparedRun,
    user: UserObjects = NOTHING,
    checkpoint: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    first_batch_only: bool = False,
) -> Iterator[Trainer]:
    """Build a trainer on this rank, ready for the next step, and close it at the end. Collective.

    checkpoint: the one to resume from; default: start the run.
    callbacks: all callbacks of this rank; those of `user` are ignored.
    first_batch_only: train on the pairs of the first global batch only, without evaluation.
    """
    with tf32_switched(PRECISION_TRAITS[context.precision].uses_tf32):
        trainer = _assemble(context, prepared, user, checkpoint, callbacks, first_batch_only)
        with closing(trainer.engine):
            yield trainer


def _assemble(
    context: RunContext,
    prepared: PreparedRun,
    user: UserObjects,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
    first_batch_only: bool,
) -> Trainer:
    spec, world, is_new = context.spec, context.world, checkpoint is None
    length = run_length(prepared.train.pairs_per_epoch, spec.batch.global_batch_size, spec.training)

    policy, reference = _build_models(context, prepared, user, is_new)
    identity = run_identity(context, prepared, policy, reference)
    cost = pair_cost(policy)
    _prepare_export(context, prepared, policy)

    engine = _wrap(context, policy, reference, length.steps, user.optimizers)
    layout = choose_layout(context, prepared, engine)
    collator = our_collator(context, prepared, layout.attention)
    loaders = build_loaders(context, prepared, collator, cost, first_batch_only)
    if spec.reference_cache != "off" and prepared.collator is None:
        key = logps_identity(context, reference, identity["reference"], layout.attention)
        open_caches(spec, loaders, key)
    if is_new and world.is_main:
        print_run(context, prepared, length.steps, layout.why_padded)
        print_types(engine, context.precision)
    _warm_up_ddp_buckets(engine, loaders.train, collator, world)

    tolerance = start_tolerance(context, engine, loaders.train) if is_new else None
    if spec.reference_cache == "full":
        fill_caches(context, engine, loaders)
    engine.step.begin_training()
    del reference

    trainer = Trainer(
        context,
        engine,
        loaders,
        _wrap_callbacks(context, prepared, engine, length, checkpoint, callbacks),
        length,
        identity,
        prepared.user_metrics,
        tolerance,
    )
    seed_everything(spec.run.seed + world.rank)
    if checkpoint is not None:
        trainer.resume(Reader(checkpoint))
    return trainer


# --- models ---------------------------------------------------------------------------------------


def _build_models(
    context: RunContext, prepared: PreparedRun, user: UserObjects, is_new: bool
) -> tuple[Any, Reference]:
    """Build policy and reference. Collective."""
    spec, world = context.spec, context.world
    dtype = dtype_held(context.precision)
    # an engine that casts and moves weights gets them in host memory: in fp32 they may not fit
    device = torch.device("cpu") if spec.engine.traits.moves_weights else world.device
    policy = build_policy(
        spec, prepared.tokenizer, dtype, device, mapped=spec.engine.shards_weights
    )
    frozen = freeze_unreached(policy, world.size)
    # the error of an approximate reference is measured when the run begins
    reference = build_reference(
        spec, policy, dtype, user.ref_model, world.device, with_exact=is_new
    )
    exact_int8_products()
    if is_new and world.is_main:
        kind = "ref_model" if user.ref_model else spec.reference.kind
        print_models(spec, prepared, policy, reference, kind, world)
        print_frozen(frozen)
    return policy, reference


def _prepare_export(context: RunContext, prepared: PreparedRun, policy: Any) -> None:
    """Check that the policy can be exported, and keep what an export needs besides its weights."""
    config = exported_config(policy, prepared.config)
    check_exportable(policy, config, context.spec)
    if context.world.is_main:
        keep_for_export(context.run_dir, context.spec, policy, prepared.tokenizer, prepared.config)


# --- the engine -----------------------------------------------------------------------------------


def _wrap(
    context: RunContext,
    policy: Any,
    reference: Reference,
    steps: int,
    optimizers: Optimizers | None,
) -> Engine:
    """Return the engine of the settings around policy and reference."""
    spec, world = context.spec, context.world
    step = _pair_step(context, policy, reference)
    engine = _engine(context)
    engine.wrap(step, *factories(spec, policy, steps, world.device, optimizers))
    return engine


def _pair_step(context: RunContext, policy: Any, reference: Reference) -> PairStep:
    """Build the module that the engine wraps, with a reference that computes in the policy's
    precision.
    """
    spec, world, precision = context.spec, context.world, context.precision
    settings, casts = spec.reference, context.has_16_bit_weights
    stays = settings.sync_every is not None or settings.dtype is not None or settings.offload
    step = PairStep(policy, reference, spec.dpo, spec.training.token_metrics, settings.sharded)
    if not settings.sharded and not settings.offload:
        dtype = None
        if casts and not stays:
            dtype = dtype_of(precision)
        elif spec.engine.shards_weights and not (spec.model.lora and spec.model.lora.base):
            dtype = dtype_held(precision)
        step.place_reference(world.device, None if settings.dtype else dtype)
    if casts and stays:
        step.reference_arithmetic = partial(autocast, world.device, precision)
    return step


def _engine(context: RunContext) -> Engine:
    """Build the engine of the settings, before it wraps anything."""
    spec, precision = context.spec, context.precision
    cast_base = spec.model.lora.cast_base if spec.model.lora else None
    frozen = DTYPES[cast_base] if cast_base else dtype_held(precision)
    limit, decay = spec.training.max_grad_norm, spec.optimizer.weight_decay
    return engine_class(spec.engine)(spec.engine, context.world, precision, limit, decay, frozen)


def _warm_up_ddp_buckets(
    engine: Engine, loader: Loader, collator: PackedCollator | PreferenceCollator, world: World
) -> None:
    """Run one micro-step of weight 0, after which DDP has rebuilt its gradient buckets.

    With three or more ranks the buckets determine the order of summation, which must be the same in
    the first step of a resumed run as in that step of an uninterrupted one.
    """
    if world.size > 1:
        shortest = loader.pairs[int(loader.order.costs.argmin())]
        filler = collator([shortest], is_filler=True).to(world.device)
        engine.micro_step(filler, Counts(1, 1), last=True)
        engine.drop_gradients()


# --- callbacks ------------------------------------------------------------------------------------


def _wrap_callbacks(
    context: RunContext,
    prepared: PreparedRun,
    engine: Engine,
    length: RunLength,
    checkpoint: Path | None,
    callbacks: Sequence[TrainerCallback],
) -> Callbacks:
    """Return the callbacks with the arguments that transformers passes to every hook."""
    spec = context.spec
    resumed_from = None if checkpoint is None else str(checkpoint)
    args = training_args(
        spec,
        context.run_dir,
        length.steps,
        length.epochs,
        context.world,
        context.precision,
        resumed_from,
    )
    objects = {
        # where weights are sharded the model would show shards
        "model": None if spec.engine.shards_weights else engine.step.policy,
        "processing_class": prepared.tokenizer,
        "optimizer": ReadOnlyOptimizer(engine.optimizer),
        "lr_scheduler": engine.scheduler,
        "train_dataloader": None,  # batches do not come from a DataLoader
        "eval_dataloader": None,
    }
    return Callbacks(list(callbacks), args, objects)
