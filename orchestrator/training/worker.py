"""run(): the one function that every rank runs; it builds the parts in reading order, then trains."""

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import AdaptedCollator, Counts, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Order, fed_lengths, run_length
from orchestrator.data.pairs import Pairs, check_source, tokenized_pairs
from orchestrator.dpo.step import PairStep
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import ReadOnlyOptimizer, check_optim, optimizer_factory, scheduler_factory
from orchestrator.models.policy import build_policy, check_fit, load_config, load_tokenizer
from orchestrator.models.reference import build_reference, check_reference
from orchestrator.settings.spec import Precision, RunSpec, UserError
from orchestrator.training import checkpoint
from orchestrator.training.callbacks import Callbacks, build_callbacks, check_callbacks, training_args
from orchestrator.training.export import export
from orchestrator.training.health import Session
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import Ended, Trainer
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    step = PairStep(policy, reference, spec.dpo)

    loader, eval_loader = _loaders(spec, prepared, world)
    length = run_length(len(prepared.train), spec.batch.global_batch_size, spec.training)
    engine = DdpEngine(world, precision, spec.training.max_grad_norm, spec.optimizer.weight_decay)
    engine.wrap(step, optimizer_factory(spec.optimizer), scheduler_factory(spec.scheduler, length.steps))
    _settle(engine, loader, _collator(spec, prepared), world)

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
        _say(spec, prepared, world, precision, length.steps)
    return _concluded(trainer.fit(), run_dir, world)


def _loaders(spec: RunSpec, prepared: Prepared, world: World) -> tuple[Loader, Loader | None]:
    collator = AdaptedCollator(spec.data.collator) if spec.data.collator else _collator(spec, prepared)

    def loader(pairs: Pairs) -> Loader:
        order = Order(
            fed_lengths(pairs.lengths, spec.data.keep_last),
            spec.batch.global_batch_size,
            world.rank,
            world.size,
            spec.run.seed,
            spec.batch.micro_batch_size,
            spec.batch.max_tokens_per_microbatch,
        )
        return Loader(pairs, order, collator)

    return loader(prepared.train), loader(prepared.eval) if prepared.eval is not None else None


def _collator(spec: RunSpec, prepared: Prepared) -> PreferenceCollator:
    pad = prepared.tokenizer.pad_token_id
    assert isinstance(pad, int)  # load_tokenizer refuses a tokenizer without one
    return PreferenceCollator(pad, spec.data)


def _settle(engine: DdpEngine, loader: Loader, collator: PreferenceCollator, world: World) -> None:
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


def _say(spec: RunSpec, prepared: Prepared, world: World, precision: str, max_steps: int) -> None:
    """What is about to happen, in a few lines."""
    for name, pairs in (("training", prepared.train), ("evaluation", prepared.eval)):
        if pairs is not None:
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in pairs.dropped.items())
            print(f"{len(pairs)} {name} pairs, {int(pairs.lengths.sum())} tokens{dropped}", flush=True)
    where = f"{world.size} ranks on {world.device.type} in {precision}"
    print(f"{where}, {spec.batch.global_batch_size} pairs a step, {max_steps} steps", flush=True)


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
