"""run(), the function that every rank runs: build the parts of a run, then train."""

import gc
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from orchestrator.callback_api import TrainerCallback
from orchestrator.data.collate import Counts, PackedCollator, PairBatch, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import (
    Order,
    PairCost,
    Share,
    epoch_order,
    fed_lengths,
    longest_sequences,
    run_length,
)
from orchestrator.data.pairs import Pairs
from orchestrator.data.refcache import RefCache, cache_folder
from orchestrator.data.tokens import tokenizer_identity
from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import Engine
from orchestrator.engines.build import engine_class
from orchestrator.engines.optim import ReadOnlyOptimizer, factories
from orchestrator.engines.precision import (
    autocast,
    dtype_held,
    dtype_of,
    is_16_bit,
    resolved,
    tf32_switched,
)
from orchestrator.models.adapters import adapter_layers
from orchestrator.models.attention import choose_kernel, not_exact, use_packed_attention
from orchestrator.models.behaviour import freeze_unreached, padding_error
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.layout_check import packed_error
from orchestrator.models.mapped import types_when_cut
from orchestrator.models.policy import build_policy, pair_cost
from orchestrator.models.quantized import exact_int8_products, is_int8, is_quantized
from orchestrator.models.reference import (
    Absent,
    PolicyStart,
    Reference,
    build_reference,
    identity_of,
    place,
)
from orchestrator.models.rope import fixed_up_to, use_own_lengths
from orchestrator.settings.counts import counted
from orchestrator.settings.rules import refuse_moving_shards
from orchestrator.settings.spec import AttentionName, Precision, Quantized, RunSpec, UserError
from orchestrator.training import checkpoint, manifest
from orchestrator.training.announce import (
    evaluation_named,
    print_frozen,
    print_models,
    print_run,
    print_types,
)
from orchestrator.training.callbacks import Callbacks, build_callbacks, training_args
from orchestrator.training.evaluate import fill_reference_cache, reference_error
from orchestrator.training.export import check_exportable, export, exported_config, keep_for_export
from orchestrator.training.health import Session
from orchestrator.training.manifest import step_folder
from orchestrator.training.prepare import PreparedRun, pad_id, prepare, quiet
from orchestrator.training.result import RunResult
from orchestrator.training.rundir import RunDir
from orchestrator.training.samples import answered_samples
from orchestrator.training.trainer import FitResult, Tolerance, Trainer
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.world import World

# tokens of a packed row on a CPU: shorter rows have more overhead, longer ones exceed its caches
CPU_ROW = 1024
# Largest packed_error that counts as rounding.
PACKED_TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 0.02, "bf16": 0.05, "fp16": 0.02}

# Random error, in nats, of a token's log-prob that was cached with another split into micro-batches
# (for a sequence, times the square root of its tokens); in int8 the outliers of a whole micro-batch
# are treated alike.
SAME_LOGPS = {"fp64": 1e-9, "fp32": 1e-3, "tf32": 0.03, "bf16": 0.1, "fp16": 0.03, "int8": 0.5}

logger = logging.getLogger(__name__)


def run(
    spec: RunSpec,
    world: World,
    session: Session,
    given: UserObjects = NOTHING,
    wrap_callbacks: Callable[[list[TrainerCallback]], list[TrainerCallback]] = list,
) -> RunResult:
    """Train one run on this rank, resuming if RUN_DIR has a complete checkpoint.

    given: the user's functions and objects; the settings define the rest. wrap_callbacks: callbacks
    of this rank (empty except on rank 0) -> those to use instead, for a debugger.

    Raises:
        UserError: the settings or the data are wrong, or RUN_DIR has checkpoints but none is
            usable.
        ReadFailed: the newest checkpoint cannot be read at the moment.
        TrainingError: training cannot continue.
    """
    quiet()
    run_dir = RunDir(spec.run_dir)
    prepared = prepare(spec, given)
    ended = _trained(spec, prepared, world, session, run_dir, given, wrap_callbacks)
    gc.collect()  # before the export builds the whole model again
    return _concluded(spec, prepared, ended, run_dir, world)


def _trained(
    spec: RunSpec,
    prepared: PreparedRun,
    world: World,
    session: Session,
    run_dir: RunDir,
    given: UserObjects,
    wrap_callbacks: Callable[[list[TrainerCallback]], list[TrainerCallback]],
) -> FitResult:
    """Train from the newest checkpoint; all parts of the run are freed when this returns."""
    found = _newest_checkpoint(run_dir, world)
    callbacks = wrap_callbacks(
        build_callbacks(spec, run_dir, given.callbacks) if world.is_main else []
    )
    with built(spec, prepared, world, session, run_dir, given, found, callbacks) as trainer:
        return trainer.fit()


@contextmanager
def built(
    spec: RunSpec,
    prepared: PreparedRun,
    world: World,
    session: Session,
    run_dir: RunDir,
    given: UserObjects = NOTHING,
    found: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    first_batch_only: bool = False,
) -> Iterator[Trainer]:
    """Build the parts of a run on this rank, ready for the next step, and close them with the
    context. Collective.

    found: the checkpoint to resume from; default: start the run.
    callbacks: all callbacks of this rank; those of `given` are ignored.
    first_batch_only: train on the pairs of the first global batch only, without evaluation.
    """
    precision = resolved(spec.precision, world.device)
    with tf32_switched(precision == "tf32"):
        trainer = _assembled(
            spec,
            precision,
            prepared,
            world,
            session,
            run_dir,
            given,
            found,
            callbacks,
            first_batch_only,
        )
        with closing(trainer.engine):
            yield trainer


def _assembled(
    spec: RunSpec,
    precision: Precision,
    prepared: PreparedRun,
    world: World,
    session: Session,
    run_dir: RunDir,
    given: UserObjects,
    found: Path | None,
    callbacks: Sequence[TrainerCallback],
    first_batch_only: bool,
) -> Trainer:
    """Build the parts of `built`. Collective."""
    dtype = dtype_held(precision)
    # DeepSpeed casts and moves weights itself: in fp32 they may not fit the device
    built_on = world.device if spec.engine.kind == "ddp" else torch.device("cpu")
    policy = build_policy(
        spec, prepared.tokenizer, dtype, built_on, mapped=spec.engine.shards_weights
    )
    frozen = freeze_unreached(policy, world.size)
    reference = build_reference(spec, policy, dtype, given.ref_model, world.device)
    exact_int8_products()
    if found is not None:
        reference.exact = None  # its error was measured when the run began
    # before any forward pass, because bitsandbytes casts biases in one
    identity = _identity(spec, prepared, policy, reference, world, dtype)
    cost = pair_cost(policy)
    length = run_length(prepared.train.pairs_per_epoch, spec.batch.global_batch_size, spec.training)
    config = exported_config(policy, prepared.config)
    check_exportable(policy, config, spec)
    if world.is_main:
        is_whole = type(config) is type(
            prepared.config
        )  # not only the language model of a multimodal one
        keep_for_export(
            run_dir, policy, prepared.tokenizer, config, spec.model.path if is_whole else None
        )
    if found is None and world.is_main:
        print_models(
            spec,
            prepared,
            policy,
            reference,
            "ref_model" if given.ref_model else spec.reference.kind,
            world,
        )
        print_frozen(frozen)
    step = _pair_step(spec, policy, reference, world, precision, dtype)
    engine = _engine(spec, world, precision, dtype)
    engine.wrap(step, *factories(spec, policy, length.steps, world.device, given.optimizers))

    attention, why_padded = _attention(spec, prepared, engine, world, precision)
    collator = _collator(spec, prepared, attention)
    loader, eval_loaders = _loaders(spec, prepared, world, cost, collator, first_batch_only)
    if spec.reference_cache != "off" and prepared.collator is None:
        said_by = {
            "reference": identity["reference"],
            **_arithmetic(spec, precision, attention, world),
        }
        if (
            fixed_up_to(reference.model.config) is not None
        ):  # earlier releases used the longest row's for all
            said_by["rope"] = "by each row's own length"
        _open_caches(spec, loader, eval_loaders, said_by)
    if found is None and world.is_main:
        print_run(spec, prepared, world, precision, length.steps, why_padded)
        print_types(engine, precision)
    _warm_up_ddp_buckets(engine, loader, collator, world)

    near = (
        _start_tolerance(spec, engine, loader, policy, reference, world, precision)
        if found is None
        else None
    )
    if spec.reference_cache == "full":
        _fill_caches(spec, engine, loader, eval_loaders, world, session)
    if spec.reference.kind == "precomputed":
        reference = step.reference = Absent()

    args = training_args(
        spec, run_dir, length.steps, length.epochs, world, precision, str(found) if found else None
    )
    trainer = Trainer(
        spec,
        world,
        session,
        run_dir,
        engine,
        loader,
        eval_loaders,
        Callbacks(list(callbacks), args, _handed_to_callbacks(spec, prepared, engine)),
        length.steps,
        length.pairs,
        precision,
        identity,
        prepared.user_metrics,
        near,
    )
    checkpoint.seed_everything(spec.run.seed + world.rank)
    if found is not None:
        trainer.resume(checkpoint.Reader(found))
    return trainer


def _arithmetic(
    spec: RunSpec, precision: Precision, attention: AttentionName, world: World
) -> dict[str, Any]:
    """Return what a reference's log-probs depend on besides its weights and the tokens."""
    made: dict[str, Any] = {
        "precision": precision,
        "attention": attention,
        "device": world.device.type,
    }
    if _casts(spec, precision):
        made["weights"] = precision
    if spec.dpo.ld_alpha is not None:
        made["ld_alpha"] = spec.dpo.ld_alpha
    return made


def _handed_to_callbacks(spec: RunSpec, prepared: PreparedRun, engine: Engine) -> dict[str, Any]:
    """Return the keyword arguments that transformers passes to every hook."""
    return {
        "model": None
        if spec.engine.shards_weights
        else engine.step.policy,  # its weights would be shards
        "processing_class": prepared.tokenizer,
        "optimizer": ReadOnlyOptimizer(engine.optimizer),
        "lr_scheduler": engine.scheduler,
        "train_dataloader": None,  # batches do not come from a DataLoader
        "eval_dataloader": None,
    }


def _newest_checkpoint(run_dir: RunDir, world: World) -> Path | None:
    """Return the checkpoint to resume from, and disable newer ones that are not complete."""
    found, complaints = checkpoint.newest_valid(run_dir.checkpoints, world)
    if complaints and found is None:
        raise UserError(
            "run.dir",
            str(run_dir.path),
            f"has checkpoints, but none is complete ({complaints[0]})",
            f"restore their files, or choose another run.name, or remove {run_dir.checkpoints} to "
            "start over",
        )
    if found is not None and complaints and world.is_main:
        for line in complaints:
            logger.warning("%s; an older checkpoint is used", line)
        manifest.set_aside(run_dir.checkpoints, found)
    return found


def _pair_step(
    spec: RunSpec,
    policy: Any,
    reference: Reference,
    world: World,
    precision: Precision,
    dtype: torch.dtype,
) -> PairStep:
    """Build the module that the engine wraps, with a reference that computes in the policy's
    precision.
    """
    wanted, casts = spec.reference, _casts(spec, precision)
    stays = wanted.sync_every is not None or wanted.dtype is not None or wanted.offload
    if (
        wanted.sync_every is not None
        and wanted.sharded
        and casts
        and spec.engine.kind == "deepspeed"
    ):
        refuse_moving_shards(wanted, precision)
    if not wanted.sharded and not wanted.offload:
        as_file = None if spec.model.lora and spec.model.lora.base else dtype
        of_weights = (
            dtype_of(precision)
            if casts and not stays
            else as_file
            if spec.engine.shards_weights
            else None
        )
        place(reference, policy, world.device, None if wanted.dtype else of_weights)
    step = PairStep(policy, reference, spec.dpo, spec.training.token_metrics, wanted.sharded)
    if casts and stays:
        step.reference_arithmetic = partial(autocast, world.device, precision)
    return step


def _engine(spec: RunSpec, world: World, precision: Precision, dtype: torch.dtype) -> Engine:
    """Build the engine of the settings, before it wraps anything."""
    base = spec.model.lora.base if spec.model.lora else None
    frozen = dtype if base is None or base in get_args(Quantized) else DTYPES[base]  # pyright: ignore
    limit, decay = spec.training.max_grad_norm, spec.optimizer.weight_decay
    return engine_class(spec.engine)(spec.engine, world, precision, limit, decay, frozen)


def _casts(spec: RunSpec, precision: Precision) -> bool:
    """Return whether the forward pass has 16-bit weights, and not only 16-bit arithmetic."""
    return is_16_bit(precision) and spec.engine.kind != "ddp"


def _attention(
    spec: RunSpec, prepared: PreparedRun, engine: Engine, world: World, precision: Precision
) -> tuple[AttentionName, str | None]:
    """Set the attention of policy and reference; return its name, and why rows are padded if that
    was not set.

    Raises:
        UserError: the rows are padded, and the model's output for one depends on the others.
    """
    fed = [
        fed_lengths(pairs.lengths, spec.data.keep_last)
        for pairs in (prepared.train, *prepared.eval.values())
    ]
    longest = max(int(longest_sequences(lengths).max()) for lengths in fed)
    policy, reference = engine.step.policy, engine.step.reference
    judges = [reference.model] + ([reference.exact.model] if reference.exact is not None else [])
    models = [
        model for model in dict.fromkeys((policy, *judges)) if model is not None
    ]  # one if both are the same
    for model in models:
        if longest > (fixed_up_to(model.config) or longest):
            use_own_lengths(model)
    if prepared.collator is not None or spec.model.attention == "padded":
        _check_padding(models, engine, world, precision)
        return "padded", None
    kernel = choose_kernel(spec.model.attention, world.device, precision)
    for model in models:
        if reason := not_exact(model.config, longest):
            _check_padding(models, engine, world, precision)
            return "padded", reason
    found: list[float] = []
    for name in dict.fromkeys((kernel, "sdpa")):
        for model in models:
            use_packed_attention(model, name)
        mine = [
            engine.run_in_forward(partial(packed_error, model, world.device))
            / _packed_tolerance(model, precision)
            for model in models
        ]
        # all ranks must have one layout, which decides the number of micro-steps; NaN exceeds every
        # tolerance
        found = [error for errors in world.gather(mine) for error in errors]
        if all(error <= 1 for error in found):
            return name, None
    return "padded", f"packed and padded rows differ by {max(found):.1e} times the rounding"


def _check_padding(models: list[Any], engine: Engine, world: World, precision: Precision) -> None:
    """Check that a sequence's log-probs do not depend on its padding. Collective."""
    for model in models:
        error = engine.run_in_forward(
            partial(padding_error, model, world.device)
        ) / _packed_tolerance(model, precision)
        if not max(world.gather(error)) <= 1:
            rule = (
                "log-probs of a sequence depend on the rows beside it: they differ by "
                f"{error:.1e} times the rounding"
            )
            raise UserError("model", type(model).__name__, rule, "use another model")


def _packed_tolerance(model: Any, precision: Precision) -> float:
    coarse = is_quantized(model) or model.dtype in (torch.bfloat16, torch.float16)
    return PACKED_TOLERANCE["bf16" if coarse else precision]


def _rounding(policy: Any, precision: Precision) -> float:
    """Return the random error, in nats, of a token's log-prob under the policy."""
    bases = [name for name, dtype in DTYPES.items() if policy.dtype == dtype] + ["int8"] * is_int8(
        policy
    )
    return max(SAME_LOGPS[name] for name in (precision, *bases))


def _identity(
    spec: RunSpec,
    prepared: PreparedRun,
    policy: Any,
    reference: Reference,
    world: World,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return what the results of a run depend on besides its settings and rows; a checkpoint can
    only be resumed with the same.
    """
    types = None  # mapped weights have the dtype of their file until they are sharded
    if (
        spec.engine.shards_weights
        and not (spec.model.lora and spec.model.lora.base)
        and not spec.reference.dtype
    ):
        types = types_when_cut(policy, dtype)
    made: dict[str, Any] = {
        "reference": identity_of(reference.tensors(), reference.model.config, world, types)
    }
    if adapter_layers(policy) and not isinstance(
        reference, PolicyStart
    ):  # then the reference is the base
        made["base"] = identity_of(PolicyStart(policy).tensors(), policy.config, world, types)
    # a user's function may have frozen some: without it the same command would train them
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    made["trainable"] = {
        "count": len(trainable),
        "names": hashlib.sha256("\n".join(trainable).encode()).hexdigest(),
    }
    template = str(prepared.tokenizer.chat_template).encode()
    if (
        spec.model.path or spec.model.tokenizer
    ):  # a new tokenizer depends on the rows, which have a hash too
        made["tokenizer"] = tokenizer_identity(prepared.tokenizer)
    return made | {"chat_template": hashlib.sha256(template).hexdigest()}


def _collator(
    spec: RunSpec, prepared: PreparedRun, attention: AttentionName
) -> PackedCollator | PreferenceCollator:
    pad = pad_id(prepared.tokenizer, prepared.config)
    return (
        PreferenceCollator(pad, spec.data) if attention == "padded" else PackedCollator(spec.data)
    )


def _loaders(
    spec: RunSpec,
    prepared: PreparedRun,
    world: World,
    cost: PairCost,
    collator: PackedCollator | PreferenceCollator,
    first_batch_only: bool,
) -> tuple[Loader, dict[str, Loader]]:
    packed = isinstance(collator, PackedCollator)
    limits = [spec.batch.max_tokens_per_microbatch] + [CPU_ROW] * (
        packed and world.device.type == "cpu"
    )

    def loader(pairs: Pairs, shares: tuple[Share, ...] = ()) -> Loader:
        order = Order(
            fed_lengths(pairs.lengths, spec.data.keep_last),
            spec.batch.global_batch_size,
            world.rank,
            world.size,
            spec.run.seed,
            spec.batch.micro_batch_size,
            min((limit for limit in limits if limit), default=None),
            packed,
            cost,
            shares,
        )
        return Loader(pairs, order, prepared.collator or collator)

    if first_batch_only:
        first = epoch_order(prepared.train.shares, spec.run.seed, epoch=0)[
            : spec.batch.global_batch_size
        ]
        return loader(prepared.train.only(np.unique(first))), {}
    return loader(prepared.train, prepared.train.shares), {
        name: loader(pairs) for name, pairs in prepared.eval.items()
    }


def _open_caches(
    spec: RunSpec, loader: Loader, eval_loaders: dict[str, Loader], identity: dict[str, Any]
) -> None:
    """Open the caches of log-probs of a reference with that identity, for all loaders.

    Raises:
        UserError: the cache cannot be written and is required before training; a lazy cache is
            skipped with a warning.
    """
    try:
        folder = cache_folder(spec.cache_dir, identity)
    except OSError as error:
        where = f"{spec.cache_dir}/reference_logps cannot be written ({error.strerror})"
        if spec.reference.kind == "precomputed":
            cure = "set data.cache_dir to a writable folder, or reference.kind=copy"
            raise UserError("reference.kind", spec.reference.kind, where, cure) from None
        if spec.reference_cache == "full":
            cure = "set data.cache_dir to a writable folder, or reference.cache=off"
            raise UserError("reference.cache", "full", where, cure) from None
        logger.warning("%s: the reference runs every time", where)
        return
    if spec.reference_cache == "full" or loader.order.takes_each_once:
        loader.cache = RefCache(folder, loader.pairs, "train", spec.data.keep_last)
    for name, each in eval_loaders.items():
        each.cache = RefCache(folder, each.pairs, f"eval {name}".rstrip(), spec.data.keep_last)


def _warm_up_ddp_buckets(
    engine: Engine, loader: Loader, collator: PackedCollator | PreferenceCollator, world: World
) -> None:
    """Run one micro-step of weight 0, after which DDP has rebuilt its gradient buckets.

    With three or more ranks the buckets determine the order of summation, which must be the same in
    the first step of a resumed run as in that step of an uninterrupted one.
    """
    if world.size > 1:
        shortest = loader.pairs[int(loader.order.costs.argmin())]
        engine.micro_step(
            collator([shortest], is_filler=True).to(world.device), Counts(1, 1), last=True
        )
        engine.drop_gradients()


def _start_tolerance(
    spec: RunSpec,
    engine: Engine,
    loader: Loader,
    policy: Any,
    reference: Reference,
    world: World,
    precision: Precision,
) -> Tolerance | None:
    """Return the tolerance for a policy that starts as its reference; None if it does not.

    Measure and print the error of an approximate reference.

    Raises:
        UserError: the error exceeds reference.max_reward_error.
    """
    is_same = reference.is_start and spec.model.disable_dropout
    rounding = _rounding(policy, precision)
    if not spec.reference.is_approximate:
        return Tolerance(rounding, 0.0) if is_same else None

    def exact(batch: PairBatch) -> torch.Tensor:
        if reference.exact is None:
            return engine.evaluate(
                batch, Counts(1, 1)
            ).logps  # the reference approximates the policy
        with autocast(world.device, precision):
            return reference.exact(batch)

    held = spec.reference.dtype or spec.reference.kind
    error = reference_error(engine, loader, exact, world)
    margin = spec.dpo.beta * error.margin
    reference.exact = None  # frees its memory
    if world.is_main:
        print(
            f"reference in {held}: log-probs of {counted(error.pairs, 'pair')} differ from "
            f"{precision} by at most {error.largest:.2g} nats, {error.mean:.2g} on average; "
            f"reward margins by at most {margin:.2g}",
            flush=True,
        )
    limit = spec.reference.max_reward_error
    if limit is not None and not margin <= limit:
        raise UserError(
            "reference.max_reward_error",
            limit,
            f"the reference in {held} changes reward margins by up to {margin:.2g}",
            "raise it, or use a reference with more bits",
        )
    # twice: the error depends on the rest of a micro-batch
    return Tolerance(rounding, 2 * error.largest) if is_same else None


def _fill_caches(
    spec: RunSpec,
    engine: Engine,
    loader: Loader,
    eval_loaders: dict[str, Loader],
    world: World,
    session: Session,
) -> None:
    """Compute all reference log-probs before the first step.

    Raises:
        UserError: on every rank, if one lacks log-probs of reference.kind=precomputed in its cache.
    """
    for name, each in (
        ("training", loader),
        *((evaluation_named(name), each) for name, each in eval_loaders.items()),
    ):
        if each.cache is None:
            continue
        beat = partial(session.heartbeat, 0, "reference cache")
        pairs, seconds = fill_reference_cache(engine, each, world, beat)
        if pairs and world.is_main:
            print(
                f"reference cache: {counted(pairs, f'{name} pair')} in {seconds:.1f} s", flush=True
            )
        missing = max(world.gather(len(each.cache.unknown())))
        if missing and spec.reference.kind == "precomputed":
            rule = (
                f"the log-probs of {counted(missing, f'{name} pair')} could not be written to "
                f"{each.cache.folder}"
            )
            raise UserError(
                "reference.kind",
                "precomputed",
                rule,
                "free space there, or set data.cache_dir to another",
            )


def _concluded(
    spec: RunSpec, prepared: PreparedRun, ended: FitResult, run_dir: RunDir, world: World
) -> RunResult:
    model_step = None
    if ended.status == "finished":
        wants_best = (
            spec.checkpoint.export == "best" and ended.best_step is not None
        )  # None if all were NaN
        model_step = ended.best_step if wants_best else ended.step
    result = RunResult(
        ended.status,
        ended.reason,
        ended.step,
        str(ended.checkpoint),
        None if model_step is None else str(run_dir.model),
        model_step,
        ended.best_step,
        ended.best_metric,
    )
    if world.is_main:  # the others do not wait: an export can take longer than a collective may
        if model_step is not None:
            if spec.checkpoint.export == "best" and ended.best_step is None:
                logger.warning(
                    "no evaluation after a step had a number for %s: the last is exported",
                    spec.evaluation.best_metric,
                )
            export(run_dir, run_dir.model, checkpoint=step_folder(run_dir.checkpoints, model_step))
            result = replace(
                result, samples=answered_samples(spec, run_dir, prepared, world.device)
            )
        run_dir.write_result(result.__dict__)
    return result
