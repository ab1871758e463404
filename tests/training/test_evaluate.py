"""Evaluation is exact: every pair once, however it is dealt to ranks and micro-batches."""

from typing import Any

import pytest
import torch

from orchestrator.data.collate import PreferenceCollator
from orchestrator.data.loader import Loader
from orchestrator.data.order import Order
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.user_collator import AdaptedCollator
from orchestrator.dpo.step import METRICS, PairStep
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.models.logps import sequence_logps
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec, LossType
from orchestrator.settings.optim import OptimizerSpec, SchedulerSpec
from orchestrator.training.evaluate import evaluate
from orchestrator.world import World
from support.run_files import without_times
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE, PAD, both_layouts, collator, data_spec, tiny_model, tokenizer
from support.tiny_settings import random_rows, write_jsonl

COUNT = 11


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    data = data_spec(train=str(write_jsonl(folder / "train.jsonl", random_rows(COUNT, longest=4))))
    return tokenized_pairs(data, "train", tokenizer(), folder)


def loader(pairs: Pairs, world: World, micro_batch_size: int, packed: bool = True) -> Loader:
    order = Order(pairs.lengths, 4, world.rank, world.size, 7, micro_batch_size, packed=packed)
    return Loader(pairs, order, collator(packed))


def made_engine(loss_type: LossType = "sigmoid") -> DdpEngine:
    ddp = DdpEngine(EngineSpec(), ALONE, "fp64", None, 0.0)
    policy, judge = tiny_model(0, torch.float64, True), tiny_model(1, torch.float64, True)
    step = PairStep(policy, Reference(judge), DpoSpec(loss_type=loss_type))
    optimizer, schedule = OptimizerSpec(), SchedulerSpec()
    ddp.wrap(step, optimizer_factory(optimizer), scheduler_factory(schedule, 1))
    return ddp


@pytest.fixture(scope="module")
def engine() -> DdpEngine:
    return made_engine()


def evaluated(
    engine: DdpEngine, pairs: Pairs, world: World, micro_batch_size: int, packed: bool = True
) -> dict[str, float]:
    return evaluate(engine, loader(pairs, world, micro_batch_size, packed), world, 3)


@pytest.fixture(scope="module")
def whole(engine: DdpEngine, pairs: Pairs) -> dict[str, float]:
    return evaluated(engine, pairs, ALONE, COUNT)


def test_evaluation_metrics_have_the_names_of_training_metrics(whole: dict[str, float]) -> None:
    assert set(without_times(whole)) == {f"eval_{name}" for name in METRICS if name != "num_tokens"}
    assert whole["eval_runtime"] > 0
    assert whole["eval_samples_per_second"] == pytest.approx(COUNT / whole["eval_runtime"])


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@both_layouts
def test_evaluation_is_equal_for_any_micro_batch_and_layout(
    engine: DdpEngine, pairs: Pairs, whole: dict[str, float], micro_batch_size: int, packed: bool
) -> None:
    metrics = evaluated(engine, pairs, ALONE, micro_batch_size, packed)
    assert without_times(metrics) == pytest.approx(without_times(whole), rel=1e-10)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_evaluation_is_equal_on_any_number_of_ranks(
    pairs: Pairs, whole: dict[str, float], ranks: int
) -> None:
    engines = [made_engine() for _ in range(ranks)]  # a model runs one forward at a time
    for actual in on_ranks(ranks, lambda world: evaluated(engines[world.rank], pairs, world, 2)):
        assert without_times(actual) == pytest.approx(without_times(whole), rel=1e-10)


def test_each_micro_batch_is_announced(engine: DdpEngine, pairs: Pairs) -> None:
    announced: list[None] = []
    evaluate(engine, loader(pairs, ALONE, 4), ALONE, 3, lambda: announced.append(None))
    assert len(announced) == 3


def first_three_scored(rows: list[Any]) -> dict[str, torch.Tensor]:
    """A user's collator that scores no more than three tokens of a completion."""
    batch = PreferenceCollator(PAD, data_spec())(rows)
    assert batch.attention_mask is not None
    mask = torch.zeros_like(batch.input_ids)
    mask.view(-1)[batch.completion_index + 1] = 1
    mask[mask.cumsum(1) > 3] = 0
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": mask,
    }


def token_mean(pairs: Pairs, at_most: int) -> float:
    """The negative log-prob of a chosen token, a mean over all, one sequence at a time."""
    model, values = tiny_model(0, torch.float64), []
    for row in (pairs[index] for index in range(COUNT)):
        ids, start = torch.tensor([row["prompt_ids"] + row["chosen_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)[start - 1 : -1]
        values += (-log_probs.gather(1, ids[0, start:, None])[:at_most, 0]).tolist()
    return sum(values) / len(values)


def sorted_loss(pairs: Pairs) -> float:
    """The loss of aot of all pairs at once."""
    batch = collator(True)([pairs[index] for index in range(COUNT)])
    w, x, ref_w, ref_x = (
        half
        for seed in (0, 1)
        for half in sequence_logps(tiny_model(seed, torch.float64, True), batch).chunk(2)
    )
    margin = 0.1 * ((w - x).sort().values - (ref_w - ref_x).sort().values)
    return float(-margin.sigmoid().log().mean())


@pytest.mark.parametrize("ranks", [1, 3])
def test_batch_losses_sort_the_whole_evaluation_set(pairs: Pairs, ranks: int) -> None:
    engines = [made_engine("aot") for _ in range(ranks)]
    for actual in on_ranks(ranks, lambda world: evaluated(engines[world.rank], pairs, world, 2)):
        assert actual["eval_loss"] == pytest.approx(sorted_loss(pairs), rel=1e-10)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("by_user", [False, True], ids=["ours", "a user's collator"])
def test_token_means_divide_by_the_tokens_of_the_whole_set(
    pairs: Pairs, ranks: int, by_user: bool
) -> None:
    engines = [made_engine("sft") for _ in range(ranks)]

    def on(world: World) -> dict[str, float]:
        step_loader = loader(pairs, world, 2, packed=not by_user)
        if by_user:
            step_loader = Loader(pairs, step_loader.order, AdaptedCollator(first_three_scored, PAD))
        return evaluate(engines[world.rank], step_loader, world, 3)

    expected = token_mean(pairs, at_most=3 if by_user else 999)
    for actual in on_ranks(ranks, on):
        assert actual["eval_loss"] == pytest.approx(expected, rel=1e-10)
