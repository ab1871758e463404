"""Cases of an engine on ranks: checkpoints, precisions, memory, and the seed's optimizers."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orchestrator.data.collate import Counts
from orchestrator.engines import optim
from orchestrator.engines.precision import Types
from orchestrator.world import World
from support.engine_runs import (
    ENGINES,
    Case,
    EngineRun,
    engine_of,
    kept,
    micro_batches,
    put_back,
    run,
    take_step,
    train,
    with_weights,
)
from support.tiny_parts import tiny_model
from support.tiny_settings import tiny_spec

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
    whole = EngineRun(
        begun.losses + gone_on.losses, begun.norms + gone_on.norms, begun.rates + gone_on.rates, {}
    )
    runs["plain"] = with_weights(whole, first, world, folder)
    _, from_canonical = resumed(world, case, canonical)
    return {"runs": runs, "gone on": gone_on, "resumed": after_it, "from canonical": from_canonical}


def resumed(world: World, case: Case, checkpoint: Path) -> tuple[Any, EngineRun]:
    """An engine that started with other weights, and the steps it takes after the checkpoint."""
    engine = engine_of(case, world, seed=3)
    put_back(engine, checkpoint)
    return engine, train(engine, case, world, range(SAVED, STEPS))


def canonical(world: World, folder: Path) -> None:
    engine = engine_of(Case(), world)
    train(engine, Case(), world, range(SAVED))
    kept(engine, world, folder, SAVED)


def gone_on(world: World, case: Case, checkpoint: Path) -> EngineRun:
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


def in_16_bits(world: World, engine: str) -> dict[str, tuple[EngineRun, list[bool]]]:
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
            EngineRun(losses, [], [u.lr for u in updated], {}),
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


def offloaded(world: World, engine: str, offload: str, folder: Path) -> tuple[EngineRun, EngineRun]:
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


def seeds(world: World, engine: str, folder: Path) -> dict[str, EngineRun]:
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
