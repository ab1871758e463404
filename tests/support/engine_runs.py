"""Tiny runs of an engine on real ranks, and the same in one process with nothing but torch: the
oracle.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
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
from orchestrator.engines import optim
from orchestrator.engines.base import Engine, OptimizerFactory, SchedulerFactory, StepResult
from orchestrator.engines.build import engine_class
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.engines.precision import Types, dtype_of, is_16_bit
from orchestrator.models.attention import choose_kernel, use_packed_attention
from orchestrator.models.layers import freeze_lowest
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec
from orchestrator.settings.precision import Precision
from orchestrator.training.checkpoint import Reader, save
from orchestrator.training.compute_metrics import UserMetrics
from orchestrator.training.evaluate import evaluate
from orchestrator.world import World
from support.tiny_parts import PAD, collator, data_spec, pair_rows, tiny_model, tokenizer
from support.tiny_settings import tiny_spec

CUT_ALL = str(
    Path(__file__).parent / "zero3_shards_all.json"
)  # else weights as small as these would not be cut at stage 3
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
    model: dict[str, Any] = field(
        default_factory=dict
    )  # config of the model, whose head is tied to its embeddings
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


class Made(NamedTuple):
    """Numbers and weights of a run."""

    losses: list[float]  # of the global batch, before each step
    norms: list[float]
    rates: list[float]
    weights: dict[str, torch.Tensor]  # at the end, whole; on rank zero alone
    state: dict[
        str, dict[str, torch.Tensor]
    ] = {}  # of the optimizer, by parameter, whole; on rank zero alone


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


def train(engine: Engine, case: Case, world: World, steps: range) -> Made:
    """Without weights."""
    taken = [take_step(engine, case, step, world) for step in steps]
    return Made(
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


def run(world: World, case: Case, folder: Path, steps: int, factories: Any = None) -> Made:
    """A whole run."""
    engine = engine_of(case, world, factories=factories)
    return with_weights(train(engine, case, world, range(steps)), engine, world, folder)


def with_weights(trained: Made, engine: Engine, world: World, folder: Path) -> Made:
    """With what the engine holds now, by way of a checkpoint: there is no other to have it
    whole.
    """
    checkpoint = kept(engine, world, folder, len(trained.losses))
    weights, state = content(checkpoint) if world.is_main else ({}, {})
    return trained._replace(weights=weights, state=state)


# --- the oracle -----------------------------------------------------------------------------------


def oracle(case: Case, steps: Iterable[int], optimizer: Any = None, schedule: Any = None) -> Made:
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
    return Made(
        losses,
        norms,
        rates,
        weights,
        {n: built.state[p] for n, p in named.items() if built.state[p]},
    )


# --- on every rank, for tests/contract/test_engines.py --------------------------------------------

STEPS, SAVED = 7, 4
CASES = {  # tied embeddings, accumulation, clipping, a schedule and uneven micro-batches in each
    "plain": Case(),
    "frozen": Case(frozen=1),
    "fewer pairs than ranks": Case(pairs=2),
}


def group(world: World, engine: str, folder: Path, canonical: Path) -> dict[str, Any]:
    """Every case; the plain one is saved in the middle, and an engine goes on from there
    beside it.
    """
    runs = {
        name: run(world, replace(case, engine=engine), folder / name.replace(" ", "_"), STEPS)
        for name, case in CASES.items()
        if name != "plain"
    }
    case = Case(engine=engine)
    first = engine_of(case, world)
    begun = train(first, case, world, range(SAVED))
    checkpoint = kept(first, world, folder, SAVED)
    gone_on = train(first, case, world, range(SAVED, STEPS))
    again, after_it = resumed(world, case, checkpoint)
    after = [list(engine.iter_shards()) for engine in (first, again)]
    assert [part[:4] for part in after[0]] == [part[:4] for part in after[1]]
    for mine, theirs in zip(*after, strict=True):
        assert mine.tensors.keys() == theirs.tensors.keys()
        for key, value in mine.tensors.items():
            assert torch.equal(value, theirs.tensors[key]), (mine.name, key)
    whole = Made(
        begun.losses + gone_on.losses, begun.norms + gone_on.norms, begun.rates + gone_on.rates, {}
    )
    runs["plain"] = with_weights(whole, first, world, folder)
    _, from_canonical = resumed(world, case, canonical)
    return {"runs": runs, "gone on": gone_on, "resumed": after_it, "from canonical": from_canonical}


def resumed(world: World, case: Case, checkpoint: Path) -> tuple[Any, Made]:
    """An engine that started with other weights, and the steps it takes after the checkpoint."""
    engine = engine_of(case, world, seed=3)
    put_back(engine, checkpoint)
    return engine, train(engine, case, world, range(SAVED, STEPS))


def canonical(world: World, folder: Path) -> None:
    engine = engine_of(Case(), world)
    train(engine, Case(), world, range(SAVED))
    kept(engine, world, folder, SAVED)


def gone_on(world: World, case: Case, checkpoint: Path) -> Made:
    return resumed(world, case, checkpoint)[1]


BIG = Case(pairs=4, model={"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128})


def bytes_held(world: World, of: Case = BIG) -> dict[str, tuple[int, int]]:
    """Bytes of optimizer state and of weights on this rank between steps, by engine."""
    values = {}
    for name in ENGINES:
        case = replace(of, engine=name)
        engine = engine_of(case, world)
        train(engine, case, world, range(1))
        state = [t for kept in engine._keeper().state.values() for t in kept.values() if t.ndim]
        weights = [getattr(p, "ds_tensor", p) for p in engine.step.policy.parameters()]
        values[name] = tuple(sum(_local(t).nbytes for t in tensors) for tensors in (state, weights))
    return values


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


OVERFLOWING = 2.0**22  # a loss scale at which fp16 gradients overflow for some steps


def in_16_bits(world: World, engine: str) -> dict[str, tuple[Made, list[bool]]]:
    """By precision, a run and which of its steps were skipped; in fp16 the first ones are made to
    overflow.

    oneDNN answers as on a CPU without AVX512-FP16, where DeepSpeed would refuse fp16.
    """
    torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: False
    values = {}
    for precision, steps in (("bf16", 4), ("fp16", 12)):
        case = Case(engine=engine, precision=precision)
        built = engine_of(case, world)
        if precision == "fp16":
            built.scale.value = OVERFLOWING
        taken = [take_step(built, case, step, world) for step in range(steps)]
        losses, updated = [loss for loss, _ in taken], [u for _, u in taken]
        values[precision] = (
            Made(losses, [], [u.lr for u in updated], {}),
            [u.skipped for u in updated],
        )
    return values


def scales_that_fit(world: World) -> dict[str, float]:
    """By engine, the loss scale at which a step of one pair, which is the first rank's, overflows
    no more.
    """
    values = {}
    for engine in ENGINES:
        case = Case(engine=engine, pairs=1, precision="fp16")
        built = engine_of(case, world)
        built.scale.value = OVERFLOWING
        while take_step(built, case, 0, world)[1].skipped:
            pass
        values[engine] = built.scale.value
        built.close()
    return values


def types(world: World, engine: str) -> dict[str, tuple[Types, list[set[torch.dtype]]]]:
    """By precision, what an engine says it holds and adds in, and what it does: weights, gradients,
    state.
    """
    values = {}
    for precision in ("fp32", "bf16"):
        case = Case(engine=engine, precision=precision)
        built = engine_of(case, world)
        take_step(built, case, 0, world)
        for number, batch in enumerate(batches := micro_batches(case, 1, world)):
            built.micro_step(batch, Counts(case.pairs, 1), last=number == len(batches) - 1)
        gradients = {gradient.dtype for gradient in built._gradients()}
        weights = {
            fragment.weight.dtype for fragment in built._fragments() if fragment.holder is not None
        }
        state = {
            t.dtype for kept in built._keeper().state.values() for t in kept.values() if t.ndim
        }
        values[precision] = built.types, [weights, gradients, state]
        built.close()
    return values


def offloaded(world: World, engine: str, offload: str, folder: Path) -> tuple[Made, Made]:
    """Steps after a checkpoint of an engine that keeps state in the host's memory, undisturbed and
    resumed.
    """
    case = Case(engine=engine, settings={"offload": offload})
    first = engine_of(case, world)
    begun = train(first, case, world, range(SAVED))
    checkpoint = kept(first, world, folder, SAVED)
    gone_on = train(first, case, world, range(SAVED, STEPS))
    assert resumed(world, case, checkpoint)[1] == gone_on
    return begun, gone_on


def twice(world: World, engine: str) -> list[list[float]]:
    """The losses of two runs of one process, as a debugger or a notebook makes them."""
    values, linear = [], nn.functional.linear
    for _ in range(2):
        built = engine_of(Case(engine=engine), world)
        values.append(train(built, Case(engine=engine), world, range(2)).losses)
        built.close()
        world.leave()
        assert nn.functional.linear is linear
    return values


SEED_STEPS, MOVES_AT = 5, 3
SGD = Case(
    pairs=2, optimizer={"name": "torch.optim.SGD", "lr": 1e-2}, scheduler={"name": "constant"}
)
ADAMW_STEP_LR = Case(
    pairs=2,
    optimizer={"name": "torch.optim.AdamW", "lr": 1e-3},
    scheduler={
        "name": "torch.optim.lr_scheduler.StepLR",
        "kwargs": {"step_size": MOVES_AT, "gamma": 0.1},
    },
)
SEEDS: dict[str, tuple[Case, Any, Any]] = {  # settings, and the same as a Python user's functions
    "SGD": (SGD, partial(torch.optim.SGD, lr=1e-2), None),
    "AdamW and StepLR": (
        ADAMW_STEP_LR,
        partial(torch.optim.AdamW, lr=1e-3),
        partial(torch.optim.lr_scheduler.StepLR, step_size=MOVES_AT, gamma=0.1),
    ),
}


def seeds(world: World, engine: str, folder: Path) -> dict[str, Made]:
    """The seed's optimizer examples by settings and by functions."""
    values = {}
    for name, (case, optimizer, schedule) in SEEDS.items():
        case = replace(case, engine=engine, total_steps=SEED_STEPS)
        spec = tiny_spec(
            folder, optimizer=case.optimizer, scheduler=case.scheduler, engine=ENGINES[engine]
        )
        for by, functions in (("YAML", None), ("Python", (optimizer, schedule))):
            built_functions = optim.factories(
                spec, tiny_model(), SEED_STEPS, world.device, functions
            )
            values[f"{name} by {by}"] = run(
                world, case, folder / f"{name} {by}", SEED_STEPS, built_functions
            )
    return values


# --- on every rank, for tests/training/test_compute_metrics.py ------------------------------------


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
