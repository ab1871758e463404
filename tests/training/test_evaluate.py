"""Evaluation is exact: every pair once, however it is dealt to ranks and micro-batches."""

import pytest
import torch
from support import rows, write_jsonl
from tiny import ALONE, both_layouts, collator, data_spec, on_ranks, tiny_model, tokenizer

from orchestrator.data.loader import Loader
from orchestrator.data.order import Order
from orchestrator.data.pairs import Pairs, tokenized_pairs
from orchestrator.dpo.step import METRICS, PairStep
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.models.reference import Reference
from orchestrator.settings.spec import DpoSpec, EngineSpec, OptimizerSpec, SchedulerSpec
from orchestrator.training.evaluate import evaluate
from orchestrator.world import World

COUNT = 11


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    data = data_spec(train=str(write_jsonl(folder / "train.jsonl", rows(COUNT, longest=4))))
    return tokenized_pairs(data, "train", tokenizer(), folder)


def loader(pairs: Pairs, world: World, micro_batch_size: int, packed: bool = True) -> Loader:
    order = Order(pairs.lengths, 4, world.rank, world.size, 7, micro_batch_size, packed=packed)
    return Loader(pairs, order, collator(packed))


def made_engine() -> DdpEngine:
    made = DdpEngine(EngineSpec(), ALONE, "fp64", None, 0.0)  # pyright: ignore[reportCallIssue]
    policy, judge = tiny_model(0, torch.float64, True), tiny_model(1, torch.float64, True)
    step = PairStep(policy, Reference(judge), DpoSpec())  # pyright: ignore[reportCallIssue]
    optimizer, schedule = OptimizerSpec(), SchedulerSpec()  # pyright: ignore[reportCallIssue]
    made.wrap(step, optimizer_factory(optimizer), scheduler_factory(schedule, 1))
    return made


@pytest.fixture(scope="module")
def engine() -> DdpEngine:
    return made_engine()


def evaluated(
    engine: DdpEngine, pairs: Pairs, world: World, micro_batch_size: int, packed: bool = True
) -> dict[str, float]:
    return evaluate(engine, loader(pairs, world, micro_batch_size, packed), world, 3)


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in ("eval_runtime", "eval_samples_per_second")}


@pytest.fixture(scope="module")
def whole(engine: DdpEngine, pairs: Pairs) -> dict[str, float]:
    return evaluated(engine, pairs, ALONE, COUNT)


def test_metrics_have_their_names(whole: dict[str, float]) -> None:
    assert set(without_time(whole)) == {f"eval_{name}" for name in METRICS if name != "num_tokens"}
    assert whole["eval_runtime"] > 0
    assert whole["eval_samples_per_second"] == pytest.approx(COUNT / whole["eval_runtime"])


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@both_layouts
def test_micro_batches_and_layout_change_nothing(
    engine: DdpEngine, pairs: Pairs, whole: dict[str, float], micro_batch_size: int, packed: bool
) -> None:
    found = evaluated(engine, pairs, ALONE, micro_batch_size, packed)
    assert without_time(found) == pytest.approx(without_time(whole), rel=1e-10)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_ranks_change_nothing(pairs: Pairs, whole: dict[str, float], ranks: int) -> None:
    engines = [made_engine() for _ in range(ranks)]  # a model runs one forward at a time
    for found in on_ranks(ranks, lambda world: evaluated(engines[world.rank], pairs, world, 2)):
        assert without_time(found) == pytest.approx(without_time(whole), rel=1e-10)


def test_each_micro_batch_is_announced(engine: DdpEngine, pairs: Pairs) -> None:
    announced: list[None] = []
    evaluate(engine, loader(pairs, ALONE, 4), ALONE, 3, lambda: announced.append(None))
    assert len(announced) == 3
