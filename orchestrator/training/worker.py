"""run(): the one function that every rank runs; it builds the parts in reading order, then trains."""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import AdaptedCollator, Counts, PackedCollator, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Order, PairCost, fed_lengths, longest_sequences, run_length
from orchestrator.data.pairs import Pairs, check_source, tokenized_pairs
from orchestrator.data.refcache import RefCache, cache_folder
from orchestrator.dpo.step import PairStep
from orchestrator.engines.ddp import DdpEngine, autocast
from orchestrator.engines.optim import ReadOnlyOptimizer, check_optim, optimizer_factory, scheduler_factory
from orchestrator.models.attention import choose_kernel, not_exact, use_packed_attention
from orchestrator.models.logps import packed_error
from orchestrator.models.policy import build_policy, check_fit, load_config, load_tokenizer, pair_cost
from orchestrator.models.reference import Reference, build_reference, check_reference, reference_identity
from orchestrator.settings.spec import AttentionName, Precision, RunSpec, UserError
from orchestrator.training import checkpoint
from orchestrator.training.callbacks import Callbacks, build_callbacks, check_callbacks, training_args
from orchestrator.training.export import export
from orchestrator.training.health import Session
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import Ended, Trainer
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_ROW = 1024  # tokens of a packed row on a CPU: shorter rows pay per operation, longer ones fall out of its caches
PACKED_TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}  # of what packed_error measures

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended; also RUN_DIR/result.json."""

    status: str  # finished: the model is exported; stopped: saved, the same command resumes
    reason: str
    step: int
    checkpoint: str
    model: str | None


@dataclass(frozen=True)
class Prepared:
    """What can be made, and refused, before any rank starts."""

    tokenizer: "PreTrainedTokenizerBase"
    config: Any
    train: Pairs
    eval: Pairs | None


def prepare(spec: RunSpec) -> Prepared:
    """Tokenizer, model config and tokenised data, from the cache where they are there already. No collective.

    Raises:
        UserError: whatever is wrong with the data, the tokenizer, the model's config or the user's code.
    """
    sources = [("data.train", spec.data.train)] + ([("data.eval", spec.data.eval)] if spec.data.eval else [])
    for key, source in sources:
        check_source(key, source)
    check_callbacks(spec)
    if spec.data.collator:
        AdaptedCollator(spec.data.collator)
    check_optim(spec.optimizer, spec.scheduler)
    _quiet()
    tokenizer = load_tokenizer(spec)
    config = load_config(spec, tokenizer)
    check_reference(spec.reference, config)
    train = tokenized_pairs(spec.data, "train", tokenizer, spec.cache_dir)
    held_out = tokenized_pairs(spec.data, "eval", tokenizer, spec.cache_dir) if spec.data.eval else None
    for (key, _), pairs in zip(sources, [train, held_out], strict=False):
        assert pairs is not None
        check_fit(config, pairs, key, spec)
    return Prepared(tokenizer, config, train, held_out)


def run(spec: RunSpec, world: World, session: Session) -> RunResult:
    """Train one run on this rank, resuming where RUN_DIR has a whole checkpoint.

    Raises:
        UserError: the settings or the data are wrong, or RUN_DIR has checkpoints of which none can be used.
        ReadFailed: the newest checkpoint cannot be read now.
        TrainingError: training cannot go on.
    """
    _quiet()
    run_dir = RunDir(spec.run_dir)
    prepared = prepare(spec)
    precision = _precision(spec.precision, world.device)
    dtype = torch.float64 if precision == "fp64" else torch.float32

    policy = build_policy(spec, prepared.tokenizer, dtype).to(world.device)  # pyright: ignore[reportArgumentType]
    reference = build_reference(spec.reference, spec.model, policy)
    attention, why_padded = _attention(spec, prepared, policy, reference, world, precision)
    step = PairStep(policy, reference, spec.dpo, spec.training.token_metrics)

    collator = _collator(spec, prepared, attention)
    loader, eval_loader = _loaders(spec, prepared, world, pair_cost(policy), collator)
    if spec.reference.cache != "off" and not spec.data.collator:
        _open_caches(spec, loader, eval_loader, reference, world, {"precision": precision, "attention": attention})
    length = run_length(len(prepared.train), spec.batch.global_batch_size, spec.training)
    engine = DdpEngine(world, precision, spec.training.max_grad_norm, spec.optimizer.weight_decay)
    engine.wrap(step, optimizer_factory(spec.optimizer), scheduler_factory(spec.scheduler, length.steps))
    _settle(engine, loader, collator, world)

    args = training_args(spec, run_dir, length.steps, length.epochs, world, precision)
    objects = {
        "model": policy,
        "processing_class": prepared.tokenizer,
        "optimizer": ReadOnlyOptimizer(engine.optimizer),
        "lr_scheduler": engine.scheduler,
    }
    callbacks = Callbacks(build_callbacks(spec, run_dir) if world.is_main else [], args, objects)
    trainer = Trainer(
        spec, world, session, run_dir, engine, loader, eval_loader, callbacks, length.steps, length.pairs, precision
    )

    checkpoint.seed_everything(spec.run.seed + world.rank)
    found, complaints = checkpoint.newest_valid(run_dir.checkpoints, world)
    if complaints and found is None:
        raise UserError(
            "run.dir",
            str(run_dir.path),
            f"has checkpoints, but none is whole ({complaints[0]})",
            f"restore their files, or choose another run.name, or remove {run_dir.checkpoints} to start over",
        )
    for line in complaints if world.is_main else []:
        logger.warning("%s; an older checkpoint is used", line)
    if found is not None and complaints and world.is_main:
        checkpoint.set_aside(run_dir.checkpoints, found)
    if found is not None:
        trainer.resume(checkpoint.Reader(found))
    elif world.is_main:
        _keep_what_an_export_needs(run_dir, policy, prepared.tokenizer)
        _say(spec, prepared, world, precision, length.steps, why_padded)
    return _concluded(trainer.fit(), run_dir, world)


def _attention(
    spec: RunSpec, prepared: Prepared, policy: Any, reference: Reference, world: World, precision: Precision
) -> tuple[AttentionName, str | None]:
    """Give both models the attention of the run; its name, and why it is padded where that was not asked for."""
    if spec.data.collator or spec.model.attention == "padded":
        return "padded", None
    kernel = choose_kernel(spec.model.attention, world.device, precision)
    fed = [fed_lengths(pairs.lengths, spec.data.keep_last) for pairs in (prepared.train, prepared.eval) if pairs]
    longest = max(int(longest_sequences(lengths).max()) for lengths in fed)
    for model in (policy, reference.model):
        if reason := not_exact(model.config, longest):
            return "padded", reason
    found: list[float] = []
    for name in dict.fromkeys((kernel, "sdpa")):
        for model in (policy, reference.model):
            use_packed_attention(model, name)
        with autocast(world.device, precision):
            mine = [packed_error(model) for model in (policy, reference.model)]
        # one layout for all ranks: it decides the number of micro-steps. A NaN is not within any tolerance
        found = [error for errors in world.gather(mine) for error in errors]
        if all(error <= PACKED_TOLERANCE[precision] for error in found):
            return name, None
    return "padded", f"packed and padded differ by {', '.join(f'{error:.1e}' for error in found)} here"


def _collator(spec: RunSpec, prepared: Prepared, attention: AttentionName) -> PackedCollator | PreferenceCollator:
    pad = prepared.tokenizer.pad_token_id
    assert isinstance(pad, int)  # load_tokenizer refuses a tokenizer without one
    return PreferenceCollator(pad, spec.data) if attention == "padded" else PackedCollator(spec.data)


def _loaders(
    spec: RunSpec,
    prepared: Prepared,
    world: World,
    cost: PairCost,
    collator: PackedCollator | PreferenceCollator,
) -> tuple[Loader, Loader | None]:
    packed = isinstance(collator, PackedCollator)
    limits = [spec.batch.max_tokens_per_microbatch] + [CPU_ROW] * (packed and world.device.type == "cpu")

    def loader(pairs: Pairs) -> Loader:
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
        )
        return Loader(pairs, order, AdaptedCollator(spec.data.collator) if spec.data.collator else collator)

    return loader(prepared.train), loader(prepared.eval) if prepared.eval is not None else None


def _open_caches(
    spec: RunSpec,
    loader: Loader,
    eval_loader: Loader | None,
    reference: Reference,
    world: World,
    arithmetic: dict[str, str],
) -> None:
    """Give the loaders what is on disk of this reference's log-probs, computed with that arithmetic.

    Raises:
        UserError: reference.cache is full and there is nowhere to keep them; lazy goes on without.
    """
    identity = {"reference": reference_identity(reference.model, world), "device": world.device.type, **arithmetic}
    try:
        folder = cache_folder(spec.cache_dir, identity)
    except OSError as error:
        where = f"{spec.cache_dir}/reference_logps cannot be written ({error.strerror})"
        if spec.reference.cache == "full":
            cure = "set data.cache_dir to a folder that can, or reference.cache=off"
            raise UserError("reference.cache", "full", where, cure) from None
        logger.warning("%s: the reference runs every time", where)
        return
    loader.cache = RefCache(folder, loader.pairs, "train", spec.data.keep_last)
    if eval_loader is not None:
        eval_loader.cache = RefCache(folder, eval_loader.pairs, "eval", spec.data.keep_last)


def _settle(engine: DdpEngine, loader: Loader, collator: PackedCollator | PreferenceCollator, world: World) -> None:
    """One weightless micro-step, after which DDP has regrouped its gradient buckets.

    With three or more ranks the grouping decides the order of summation: it must be the same at the first step of a
    resumed run as at that step of an undisturbed one.
    """
    if world.size > 1:
        shortest = loader.pairs[int(loader.order.costs.argmin())]
        engine.micro_step(collator([shortest], is_filler=True).to(world.device), Counts(1, 1), last=True)
        engine.discard()


def _precision(asked: Precision, device: torch.device) -> Precision:
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _keep_what_an_export_needs(run_dir: RunDir, policy: Any, tokenizer: Any) -> None:
    run_dir.tokenizer.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(run_dir.tokenizer)
    policy.config.save_pretrained(run_dir.tokenizer)
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(run_dir.tokenizer)


def _concluded(ended: Ended, run_dir: RunDir, world: World) -> RunResult:
    model = run_dir.model if ended.status == "finished" else None
    result = RunResult(ended.status, ended.reason, ended.step, str(ended.checkpoint), str(model) if model else None)
    if world.is_main:  # the others do not wait: an export can take longer than a collective may
        if model:
            export(run_dir, model, checkpoint=ended.checkpoint)
        run_dir.write_result(result.__dict__)
    return result


def _say(
    spec: RunSpec,
    prepared: Prepared,
    world: World,
    precision: str,
    max_steps: int,
    why_padded: str | None,
) -> None:
    """What is about to happen, in a few lines."""
    for name, pairs in (("training", prepared.train), ("evaluation", prepared.eval)):
        if pairs is not None:
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in pairs.dropped.items())
            print(f"{len(pairs)} {name} pairs, {int(pairs.lengths.sum())} tokens{dropped}", flush=True)
    where = f"{world.size} ranks on {world.device.type} in {precision}"
    print(f"{where}, {spec.batch.global_batch_size} pairs a step, {max_steps} steps", flush=True)
    if why_padded is not None:
        print(f"two padded rows per pair instead of a packed one: {why_padded}", flush=True)


def _quiet() -> None:
    """Libraries' progress bars and advice would bury our lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")


def finished_already(run_dir: RunDir) -> RunResult | None:
    """The result of a run that is complete, so that the same command again does nothing."""
    result = last_result(run_dir)
    if result is None or result.status != "finished":
        return None
    return result if run_dir.model.is_dir() and Path(result.checkpoint).is_dir() else None


def last_result(run_dir: RunDir) -> RunResult | None:
    """How the last attempt ended, if it came to an end."""
    if not run_dir.result.is_file():
        return None
    result = json.loads(run_dir.result.read_text())
    return RunResult(**result) if result["status"] in ("finished", "stopped") else None
