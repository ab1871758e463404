"""Every engine on 1, 2 and 3 real ranks is one process of plain torch; from what one has kept any
other goes on.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.engines.precision import Types
from support import engine_cases, engine_runs
from support.engine_cases import BIG, CASES, SAVED, STEPS
from support.engine_runs import ENGINES, Case, EngineRun
from support.gloo_ranks import on_gloo
from support.repository import ROOT

SIZES = [1, 2, 3]
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_size = pytest.mark.parametrize("size", SIZES)
every_case = pytest.mark.parametrize("case", CASES)


class Group:
    """Results of one engine on a number of ranks: all from one set of processes, whose start takes
    longest.
    """

    def __init__(self, engine: str, size: int, folder: Path, canonical: Path) -> None:
        self.checkpoint = folder / f"step_{SAVED:08d}"
        results = on_gloo(size, engine_cases.group, engine, folder, canonical)
        self.runs: dict[str, EngineRun] = results[0]["runs"]
        self.gone_on, self.resumed, self.from_canonical = (
            results[0][key] for key in ("gone on", "resumed", "from canonical")
        )


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Group]:
    folder = tmp_path_factory.mktemp("engines")
    on_gloo(1, engine_cases.canonical, folder / "canonical")

    @cache
    def group(engine: str, size: int) -> Group:
        return Group(
            engine, size, folder / f"{engine}-{size}", folder / "canonical" / f"step_{SAVED:08d}"
        )

    return group


@cache
def oracle(case: str, steps: int = STEPS) -> EngineRun:
    return engine_runs.oracle(CASES[case], range(steps))


def assert_alike(trained: EngineRun, expected: EngineRun, steps: slice = slice(None)) -> None:
    assert trained.losses == pytest.approx(expected.losses[steps], rel=1e-5)
    assert trained.norms == pytest.approx(expected.norms[steps], rel=1e-4)
    assert trained.rates == pytest.approx(expected.rates[steps], rel=1e-12)


# --- the curve ------------------------------------------------------------------------------------


@every_engine
@every_size
@every_case
def test_the_curve_and_the_weights_are_those_of_plain_torch(
    groups: Any, engine: str, size: int, case: str
) -> None:
    actual, expected = groups(engine, size).runs[case], oracle(case)
    assert_alike(actual, expected)
    assert actual.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert (actual.weights[name] - value).abs().max() < 1e-5, name


def test_the_oracle_learns_and_clips() -> None:
    """Else it would say little that a run is as its."""
    actual, start = oracle("plain"), engine_runs.pair_step(Case()).policy.state_dict()
    assert len(set(actual.rates)) == STEPS
    assert min(actual.norms) > 0.5  # every gradient is clipped at 0.05
    assert all((value - start[name]).abs().max() > 1e-3 for name, value in actual.weights.items())
    frozen = oracle("frozen")
    assert torch.equal(
        frozen.weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"]
    )


# --- checkpoints ----------------------------------------------------------------------------------


@every_engine
@every_size
def test_a_checkpoint_is_what_plain_torch_holds(groups: Any, engine: str, size: int) -> None:
    weights, state = engine_runs.content(groups(engine, size).checkpoint)
    expected = oracle("plain", SAVED)
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert (weights[name] - value).abs().max() < 1e-5, name
    assert state.keys() == expected.state.keys()
    for name, kept in expected.state.items():
        assert state[name].keys() == kept.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state[name]["step"].item() == kept["step"].item() == SAVED
        for key in ("exp_avg", "exp_avg_sq"):
            value = kept[key].flatten()
            assert (state[name][key] - value).abs().max() < 1e-5 * value.abs().max(), (name, key)


@every_engine
@every_size
def test_every_engine_resumes_a_ddp_checkpoint_on_the_same_curve(
    groups: Any, engine: str, size: int
) -> None:
    assert_alike(groups(engine, size).from_canonical, oracle("plain"), slice(SAVED, STEPS))


@every_engine
@every_size
def test_resume_on_the_same_engine_is_bitwise(groups: Any, engine: str, size: int) -> None:
    """Weights and state of every rank were compared there."""
    group = groups(engine, size)
    assert group.resumed == group.gone_on


ALL = [(engine, size) for engine in ENGINES for size in SIZES]
PAIRS = random.Random(5).sample(
    [(a, b) for a in ALL for b in ALL if a[0] != b[0] and a[1] != b[1]], 6
)


@pytest.mark.parametrize(("writer", "reader"), PAIRS, ids=lambda end: f"{end[0]}x{end[1]}")
def test_engines_resume_each_others_checkpoints(groups: Any, writer: Any, reader: Any) -> None:
    wrote = groups(*writer)
    [rank_zero, *_] = on_gloo(
        reader[1], engine_cases.gone_on, Case(engine=reader[0]), wrote.checkpoint
    )
    assert_alike(rank_zero, wrote.gone_on)


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held() -> dict[int, list[dict[str, tuple[int, int]]]]:
    """By world size, for each rank: bytes of optimizer state and of weights between steps, by
    engine.
    """
    return {size: on_gloo(size, engine_cases.bytes_held) for size in (1, 2, 4)}


@every_engine
@pytest.mark.parametrize("size", [2, 4])
def test_optimizer_state_is_sharded(held: Any, engine: str, size: int) -> None:
    policy = engine_runs.pair_step(BIG).policy
    [whole] = [rank[engine] for rank in held[1]]
    assert whole[0] == pytest.approx(2 * 4 * sum(p.numel() for p in policy.parameters()), rel=1e-3)
    largest = 2 * 4 * max(p.numel() for p in policy.parameters())
    padding = 1024  # bytes: parts are aligned
    for rank in held[size]:
        state, weights = rank[engine]
        assert state <= whole[0] / size + (largest if engine == "ddp" else padding)
        if engine in ("zero3", "fsdp"):
            assert weights <= whole[1] / size + padding
        else:
            assert weights == whole[1]


# --- precision, offloading, a user's own ----------------------------------------------------------


@pytest.fixture(scope="module")
def in_16_bits() -> Any:
    return cache(lambda engine: on_gloo(2, engine_cases.in_16_bits, engine)[0])


@every_engine
def test_bf16_is_near_fp32(in_16_bits: Any, engine: str) -> None:
    actual, skipped = in_16_bits(engine)["bf16"]
    expected = engine_runs.oracle(Case(), range(len(actual.losses)))
    assert actual.losses == pytest.approx(expected.losses, rel=0.05)
    assert actual.losses != pytest.approx(expected.losses, rel=1e-5)
    assert actual.rates == pytest.approx(expected.rates, rel=1e-12)
    assert not any(skipped)


@every_engine
def test_a_skipped_fp16_step_is_not_counted(in_16_bits: Any, engine: str) -> None:
    """The rate is a function of the steps that were taken, as with torch's GradScaler."""
    actual, skipped = in_16_bits(engine)["fp16"]
    assert 3 < sum(skipped) < 9
    first = skipped.index(False)
    assert first > 3
    rates = engine_runs.oracle(Case(), range(len(skipped))).rates
    taken = [step for step, other in enumerate(skipped) if not other]
    counted = [sum(before < step for before in taken) for step in range(len(skipped))]
    assert actual.rates == pytest.approx([rates[count] for count in counted], rel=1e-12)
    expected = engine_runs.oracle(Case(), taken).losses  # as if the others had not been
    assert [actual.losses[step] for step in taken] == pytest.approx(expected, rel=0.1)


def test_an_fp16_step_overflows_on_many_ranks_where_it_does_on_one() -> None:
    [alone], [first, *_] = (
        on_gloo(1, engine_cases.scales_that_fit),
        on_gloo(4, engine_cases.scales_that_fit),
    )
    assert first == alone


REPORTED_TYPES = {
    "ddp": Types("fp32", "bf16 by autocast", "fp32", "fp32"),
    "fsdp": Types("fp32 (gathered in bf16)", "bf16", "fp32", "fp32"),
    **dict.fromkeys(
        ("zero1", "zero2", "zero3"),
        Types("bf16 (a rank's part also in fp32)", "bf16", "fp32", "fp32"),
    ),
}


@every_engine
def test_reported_types_are_those_held_and_reduced(engine: str) -> None:
    [rank_zero] = on_gloo(1, engine_cases.types, engine)
    assert rank_zero["fp32"][0] == Types("fp32", "fp32", "fp32", "fp32")
    assert rank_zero["bf16"][0] == REPORTED_TYPES[engine]
    for _, held in rank_zero.values():
        assert held == [{torch.float32}] * 3


OFFLOADS = [
    ("zero1", "optimizer"),
    ("zero2", "optimizer"),
    ("zero3", "optimizer"),
    ("zero3", "parameters"),
]


@pytest.mark.parametrize(("engine", "offload"), [*OFFLOADS, ("fsdp", "parameters")])
def test_offloading_changes_no_number(engine: str, offload: str, tmp_path: Path) -> None:
    [(begun, gone_on), *_] = on_gloo(2, engine_cases.offloaded, engine, offload, tmp_path)
    assert_alike(begun, oracle("plain"), slice(SAVED))
    assert_alike(gone_on, oracle("plain"), slice(SAVED, STEPS))


@every_engine
def test_the_seeds_optimizers_by_settings_and_by_functions(engine: str, tmp_path: Path) -> None:
    [rank_zero, *_] = on_gloo(2, engine_cases.seeds, engine, tmp_path)
    assert len(rank_zero) == 4
    for name, run in rank_zero.items():
        case, optimizer, schedule = engine_cases.SEEDS[name.partition(" by ")[0]]
        case = replace(case, total_steps=engine_cases.SEED_STEPS)
        own = (None, None) if name.endswith("YAML") else (optimizer, schedule)
        expected = engine_runs.oracle(case, range(engine_cases.SEED_STEPS), *own)
        assert_alike(run, expected)
        for parameter, value in expected.weights.items():
            assert (run.weights[parameter] - value).abs().max() < 1e-5, (name, parameter)
        if "StepLR" in name:
            after = engine_cases.SEED_STEPS - engine_cases.MOVES_AT
            assert run.rates == pytest.approx([1e-3] * engine_cases.MOVES_AT + [1e-4] * after)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_deepspeed_file_sets_up_the_engine(stage: int, tmp_path: Path) -> None:
    """Those that are shipped, in which "auto" stands as users of transformers write it."""
    preset = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    case = Case(engine=f"zero{stage}", settings={"deepspeed_config": str(preset)})
    [rank_zero, *_] = on_gloo(2, engine_runs.run, case, tmp_path, STEPS)
    assert_alike(rank_zero, oracle("plain"))


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_two_runs_in_one_process(engine: str) -> None:
    [(first, second)] = on_gloo(1, engine_cases.twice, engine)
    assert first == second
