"""Tiny runs of an engine on real ranks, and the same in one process with nothing but torch: the
oracle.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from orchestrator.data.collate import Counts, PairBatch, PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Order
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import Engine, OptimizerFactory, SchedulerFactory, StepResult
from orchestrator.engines.build import engine_class
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.engines.precision import dtype_of, is_16_bit
from orchestrator.models.attention import choose_kernel, use_packed_attention
from orchestrator.models.layers import freeze_lowest
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec
from orchestrator.settings.precision import Precision
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpoint_writer import save
from orchestrator.training.compute_metrics import UserMetrics
from orchestrator.training.evaluate import evaluate
from orchestrator.world import World
from support.tiny_parts import PAD, collator, data_spec, pair_rows, tiny_model, tokenizer

# else weights as small as these would not be cut at stage 3
CUT_ALL = str(Path(__file__).parent / "zero3_shards_all.json")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "deepspeed_config": CUT_ALL},
    "fsdp": {"kind": "fsdp"},
}
MICRO = 2  # pairs of a micro-batch at most
ADAMW: dict[str, Any] = {"name": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}
COSINE: dict[str, Any] = {"name": "cosine", "warmup_steps": 3}


@dataclass(frozen=True)
class Case:
    """One run: what is trained, on how many pairs a step, and how."""

    engine: str = "ddp"
    pairs: int = 7  # of a global batch: neither 2 nor 3 ranks nor micro-batches of 2 divide it
    # config of the model, whose head is tied to its embeddings
    model: dict[str, Any] = field(default_factory=dict)
    frozen: int = 0  # lowest layers, and the embeddings
    optimizer: dict[str, Any] = field(default_factory=lambda: ADAMW)
    scheduler: dict[str, Any] = field(default_factory=lambda: COSINE)
    total_steps: int = 20
    max_grad_norm: float | None = 0.05  # every gradient is clipped
    precision: Precision = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)  # more of the engine's

    @property
    def factories(self) -> tuple[OptimizerFactory, SchedulerFactory]:
        schedule = scheduler_factory(SchedulerSpec(**self.scheduler), self.total_steps)
        return optimizer_factory(OptimizerSpec(**self.optimizer)), schedule


class EngineRun(NamedTuple):
    """Numbers and weights of a run."""

    losses: list[float]  # of the global batch, before each step
    norms: list[float]
    rates: list[float]
    weights: dict[str, torch.Tensor]  # at the end, whole; on rank 0 alone
    state: dict[
        str, dict[str, torch.Tensor]
    ] = {}  # of the optimizer, by parameter, whole; on rank 0 alone


def pair_step(case: Case, seed: int = 0) -> PairStep:
    policy = tiny_model(seed, packed=True, **case.model)
    if case.frozen:
        freeze_lowest(policy, case.frozen)
    dpo = DpoSpec(beta=0.5)
    return PairStep(policy, Reference(tiny_model(1, packed=True, **case.model)), dpo)


def engine_of(case: Case, world: World, seed: int = 0, factories: Any = None) -> Any:
    """The engine with a model of that seed: another one than the run's for an engine that is to
    resume it.
    """
    spec = EngineSpec(**{**ENGINES[case.engine], **case.settings})
    engine = engine_class(spec)(
        spec, world, case.precision, case.max_grad_norm, case.optimizer.get("weight_decay", 0.0)
    )
    step = pair_step(case, seed)
    if world.device.type == "cuda":
        _onto_gpu(step, case, world.device)
    engine.wrap(step, *(factories or case.factories))
    # as assemble.py does: with three ranks or more DDP groups its gradients anew after the first,
    # and sums otherwise
    filler = collator(packed=True)(pair_rows(1), is_filler=True).to(world.device)
    engine.micro_step(filler, Counts(1, 1), last=True)
    engine.drop_gradients()
    return engine


def _onto_gpu(step: PairStep, case: Case, device: torch.device) -> None:
    """As assemble.py does: the engines that cut weights take them from the host, and a reference is
    of their type.
    """
    reference: Any = step.reference
    for model in (step.policy, reference.model):
        use_packed_attention(model, choose_kernel("auto", device, case.precision))
    if case.engine == "ddp":
        step.policy.to(device)
    casts = is_16_bit(case.precision) and case.engine != "ddp"
    step.place_reference(device, dtype_of(case.precision) if casts else None)


def micro_batches(case: Case, step: int, world: World) -> list[PairBatch]:
    """This rank's pairs in micro-batches, with fillers up to as many as the first rank has."""
    rows = pair_rows(case.pairs, seed=1000 + step)
    own, most = rows[world.rank :: world.size], rows[:: world.size]
    batches = [collator(packed=True)(own[at : at + MICRO]) for at in range(0, len(own), MICRO)]
    missing = -(-len(most) // MICRO) - len(batches)
    batches += [collator(packed=True)(rows[:1], is_filler=True)] * missing
    return [batch.to(world.device) for batch in batches]


def take_step(engine: Engine, case: Case, step: int, world: World) -> tuple[float, StepResult]:
    batches = micro_batches(case, step, world)
    loss = torch.zeros(1, dtype=torch.float64, device=world.device)
    for number, batch in enumerate(batches):
        loss += engine.micro_step(
            batch, Counts(case.pairs, 1), last=number == len(batches) - 1
        ).loss
    non_finite = world.max((~engine.grads_finite()).int().view(1)).item()
    return world.sum(loss).item(), engine.optimizer_step(apply=not non_finite)


def train(engine: Engine, case: Case, world: World, steps: range) -> EngineRun:
    """Without weights."""
    taken = [take_step(engine, case, step, world) for step in steps]
    return EngineRun(
        [t[0] for t in taken], [float(t[1].grad_norm) for t in taken], [t[1].lr for t in taken], {}
    )


def kept(engine: Engine, world: World, folder: Path, step: int) -> Path:
    """A checkpoint."""
    return save(folder, step, engine.iter_shards(), {"engine": engine.state()}, world)


def put_back(engine: Engine, checkpoint: Path) -> None:
    reader = Reader(checkpoint)
    engine.load_shards(reader.read, reader.keys)
    engine.set_state(reader.meta["engine"])


def content(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights and optimizer state of a checkpoint, whole."""
    reader = Reader(checkpoint)
    weights = {name: reader.parameter(name).clone() for name in reader.shapes}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        for key in reader.keys(name) - {"param"}:
            whole = reader.read(name, key, 0, 1 if key.startswith("scalar:") else value.numel())
            state.setdefault(name, {})[key.removeprefix("scalar:")] = whole.clone()
    return weights, state


def run(world: World, case: Case, folder: Path, steps: int, factories: Any = None) -> EngineRun:
    """A whole run."""
    engine = engine_of(case, world, factories=factories)
    return with_weights(train(engine, case, world, range(steps)), engine, world, folder)


def with_weights(trained: EngineRun, engine: Engine, world: World, folder: Path) -> EngineRun:
    """With what the engine holds now, by way of a checkpoint: there is no other to have it
    whole.
    """
    checkpoint = kept(engine, world, folder, len(trained.losses))
    weights, state = content(checkpoint) if world.is_main else ({}, {})
    return trained._replace(weights=weights, state=state)


# --- the oracle -----------------------------------------------------------------------------------


def oracle(
    case: Case, steps: Iterable[int], optimizer: Any = None, schedule: Any = None
) -> EngineRun:
    """One process, whole batches, torch's optimizer, clip_grad_norm_ and the schedule: nothing of
    an engine.

    optimizer, schedule: a user's functions; those of the case if not given.
    """
    step = pair_step(case)
    named = {n: p for n, p in step.policy.named_parameters() if p.requires_grad}
    groups = [
        {
            "params": [p for p in named.values() if p.ndim > 1],
            "weight_decay": case.optimizer.get("weight_decay", 0.0),
        },
        {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if optimizer is None:
        kind = getattr(torch.optim, case.optimizer["name"].rpartition(".")[2])
        built = kind(groups, lr=case.optimizer["lr"], **case.optimizer.get("kwargs", {}))
    else:
        built = optimizer(groups)
    scheduler = (schedule or case.factories[1])(built)
    losses, norms, rates = [], [], []
    for number in steps:
        batch = collator(packed=True)(pair_rows(case.pairs, seed=1000 + number))
        loss = step(batch, Counts(case.pairs, 1)).loss
        built.zero_grad()
        loss.backward()
        norms.append(
            float(nn.utils.clip_grad_norm_(named.values(), case.max_grad_norm or float("inf")))
        )
        rates.append(scheduler.get_last_lr()[0])
        built.step()
        scheduler.step()
        losses.append(loss.item())
    weights = {n: p.detach().clone() for n, p in step.policy.named_parameters()}
    return EngineRun(
        losses,
        norms,
        rates,
        weights,
        {n: built.state[p] for n, p in named.items() if built.state[p]},
    )


# --- evaluation


def loader(pairs: Pairs, world: World, packed: bool) -> Loader:
    order = Order(pairs.lengths, 4, world.rank, world.size, 7, MICRO, packed=packed)
    return Loader(pairs, order, collator(packed))


def handed_over(world: World, engine: str, folder: Path, batch_size: int) -> list[Any] | None:
    """Return on rank 0 what compute_metrics gets for the rows in a folder: the columns of pairs,
    then logits and labels.
    """
    built = engine_of(Case(engine=engine), world)
    pairs = tokenized_pairs(
        data_spec(train=str(folder / "train.jsonl")), "train", tokenizer(), folder
    )
    values: list[Any] = []

    def keep(eval_preds: Any) -> dict[str, float]:
        predictions, labels = eval_preds
        values.extend((predictions, labels) if isinstance(predictions, np.ndarray) else predictions)
        return {}

    for logits in (False, True):
        padded = PreferenceCollator(PAD, data_spec())
        user = UserMetrics(
            keep, "keep", logits, batched=False, batch_size=batch_size, padded=padded
        )
        evaluate(built, loader(pairs, world, packed=True), world, 0, user=user)
    return values if world.is_main else None
