"""A user's compute_metrics gets the same arguments for any ranks, layout or engine; its return
value is checked.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data.collate import PreferenceCollator
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.settings.errors import UserError
from orchestrator.training import compute_metrics as module
from orchestrator.training.compute_metrics import (
    KEY,
    PADDING,
    Predictions,
    UserMetrics,
    check_memory,
    user_metrics,
)
from orchestrator.training.evaluate import evaluate
from orchestrator.training.user_objects import NOTHING, UserObjects
from orchestrator.world import World
from support import engine_runs
from support.gloo_ranks import on_gloo
from support.thread_ranks import on_ranks
from support.tiny_parts import ALONE, PAD, data_spec, tokenizer
from support.tiny_settings import random_rows, tiny_spec, write_jsonl

COUNT, BATCH = 7, 3  # pairs: of the set, and of a batch
FP32 = {"rtol": 1e-4, "atol": 1e-5}


class Keeps:
    """A user's function that keeps what it was handed."""

    def __init__(self) -> None:
        self.handed: list[tuple[Any, Any, bool | None]] = []

    def __call__(self, eval_preds: Any, compute_result: bool | None = None) -> dict[str, float]:
        predictions, labels = eval_preds
        self.handed.append((predictions, labels, compute_result))
        return {"calls": len(self.handed)}


def user(function: Any, **settings: Any) -> UserMetrics:
    values = {"logits": False, "batched": False, "batch_size": BATCH, **settings}
    return UserMetrics(function, "mine", **values, padded=PreferenceCollator(PAD, data_spec()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_jsonl(root / "train.jsonl", random_rows(COUNT, longest=4))
    return root


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Pairs:
    return tokenized_pairs(
        data_spec(train=str(folder / "train.jsonl")), "train", tokenizer(), folder
    )


@pytest.fixture(scope="module")
def engines() -> list[Any]:
    # a model runs one forward at a time
    return [engine_runs.engine_of(engine_runs.Case(), ALONE) for _ in range(3)]


def handed(
    engines: list[Any], pairs: Pairs, ranks: int = 1, packed: bool = True, **settings: Any
) -> Keeps:
    """Return the function's arguments on so many ranks; every rank has its result, and only rank 0
    calls it.
    """
    values = [Keeps() for _ in range(ranks)]

    def on(world: World) -> dict[str, float]:
        loader = engine_runs.loader(pairs, world, packed)
        return evaluate(
            engines[world.rank], loader, world, 3, user=user(values[world.rank], **settings)
        )

    for actual in on_ranks(ranks, on):
        assert not isinstance(actual, Exception), actual
        assert actual["eval_calls"] == len(values[0].handed)
    assert not any(other.handed for other in values[1:])
    return values[0]


@pytest.fixture(scope="module")
def by_hand(engines: list[Any], pairs: Pairs) -> Predictions:
    """One sequence at a time, with nothing of ours but the models."""
    by_name: dict[str, list[list[float]]] = {"logps": [], "ref_logps": [], "lengths": []}
    models = {"logps": engines[0].step.policy, "ref_logps": engines[0].step.reference.model}
    for row in (pairs[index] for index in range(COUNT)):
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
        by_name["lengths"].append([len(completion) for _, completion in sides])
        for name, model in models.items():
            collected = []
            for prompt, completion in sides:
                ids = torch.tensor([prompt + completion])
                with torch.no_grad():
                    logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
                collected.append(
                    logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum().item()
                )
            by_name[name].append(collected)
    arrays = {name: np.array(values) for name, values in by_name.items()}
    beta = engines[0].step.dpo.beta
    return Predictions(**arrays, rewards=beta * (arrays["logps"] - arrays["ref_logps"]))


@pytest.mark.parametrize(("ranks", "packed"), [(1, True), (1, False), (2, True), (3, False)])
def test_each_pair_is_a_row_in_the_order_of_the_set(
    engines: list[Any], pairs: Pairs, by_hand: Predictions, ranks: int, packed: bool
) -> None:
    [(predictions, labels, _)] = handed(engines, pairs, ranks, packed).handed
    assert isinstance(predictions, Predictions)
    for name, expected in by_hand._asdict().items():
        np.testing.assert_allclose(getattr(predictions, name), expected, **FP32, err_msg=name)
    assert predictions.lengths.dtype == labels.dtype == np.int64
    assert labels.tolist() == [0] * COUNT


def padded_batches(engines: list[Any], pairs: Pairs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and input_ids of whole padded batches, by the model as transformers calls it."""
    values = []
    for start in range(0, COUNT, BATCH):
        batch = PreferenceCollator(PAD, data_spec())(
            [pairs[i] for i in range(start, min(start + BATCH, COUNT))]
        )
        with torch.no_grad():
            model = engines[0].step.policy.eval()
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        values.append((logits, batch.input_ids))
    return values


@pytest.mark.parametrize(("ranks", "packed"), [(1, True), (2, False), (3, True)])
def test_logits_are_those_of_padded_batches(
    engines: list[Any], pairs: Pairs, ranks: int, packed: bool
) -> None:
    expected = padded_batches(engines, pairs)
    [(logits, labels, _)] = handed(engines, pairs, ranks, packed, logits=True).handed
    width, at = max(ids.shape[1] for _, ids in expected), 0
    assert logits.shape == (2 * COUNT, width, 300)
    for exact, ids in expected:
        here, used = slice(at, at + len(ids)), ids.shape[1]
        np.testing.assert_allclose(logits[here, :used], exact, **FP32)
        np.testing.assert_array_equal(labels[here, :used], ids)
        assert (logits[here, used:] == PADDING).all()
        assert (labels[here, used:] == PADDING).all()
        at += len(ids)


def test_the_logits_are_the_same_to_the_last_bit_on_any_number_of_ranks(
    engines: list[Any], pairs: Pairs
) -> None:
    [(alone, _, _)], [(shared, _, _)] = (
        handed(engines, pairs, ranks, logits=True).handed for ranks in (1, 3)
    )
    assert np.array_equal(alone, shared)


@pytest.mark.parametrize("ranks", [1, 2])
def test_compute_metrics_gets_batches_one_at_a_time(
    engines: list[Any],
    pairs: Pairs,
    by_hand: Predictions,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", 2000)  # a few positions at a time
    called = handed(engines, pairs, ranks, logits=True, batched=True).handed
    assert [is_last for _, _, is_last in called] == [False, False, True]
    for (logits, labels, _), (exact, ids) in zip(
        called, padded_batches(engines, pairs), strict=True
    ):
        torch.testing.assert_close(logits, exact, **FP32)
        assert torch.equal(labels, ids)
    called = handed(engines, pairs, ranks, batched=True).handed
    assert [len(part.logps) for part, _, _ in called] == [3, 3, 1]
    assert [is_last for _, _, is_last in called] == [False, False, True]
    whole = torch.cat([part.rewards for part, _, _ in called])
    np.testing.assert_allclose(whole, by_hand.rewards, **FP32)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_an_engine_that_shards_weights_hands_over_the_same(
    engines: list[Any], pairs: Pairs, folder: Path, engine: str
) -> None:
    by_rank, nothing = on_gloo(2, engine_runs.handed_over, engine, folder, BATCH)
    assert nothing is None
    [(predictions, _, _)] = handed(engines, pairs).handed
    [(logits, labels, _)] = handed(engines, pairs, logits=True).handed
    for exact, expected in zip(by_rank, (*predictions, logits, labels), strict=True):
        np.testing.assert_allclose(exact, expected, **FP32)


# --- what it may say ------------------------------------------------------------------------------


def test_returned_numbers_of_any_type_are_metrics(engines: list[Any], pairs: Pairs) -> None:
    actual = {
        "a": 1,
        "b": 0.5,
        "c": np.float32(2),
        "d": torch.tensor([3.0]),
        "eval_e": np.array(4),
        "eval_odd_f": True,
    }
    loader = engine_runs.loader(pairs, ALONE, True)
    metrics = evaluate(engines[0], loader, ALONE, 3, name="odd", user=user(lambda _: actual))
    expected = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 3.0, "eval_e": 4.0, "f": 1.0}
    assert {name: metrics[f"eval_odd_{name}"] for name in expected} == expected


def raising(_: Any) -> dict[str, float]:
    raise IndexError("too far")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raising, "raised IndexError: too far (test_compute_metrics.py line"),
        (lambda _: [0.5], "returned a list (evaluation of odd after step 3)"),
        (lambda _: None, "returned a NoneType"),
        (lambda _: {"a": "high"}, "returned a = 'high', which is not a number"),
        (lambda _: {"a": np.zeros(2)}, "returned a = array([0., 0.]), which is not a number"),
        (lambda _: {3: 0.5}, "returned the name 3, which is not a string"),
        (
            lambda _: {"loss": 0.5},
            "returned loss, which is the name of a metric of every evaluation",
        ),
    ],
)
@pytest.mark.parametrize("logits", [False, True])
def test_a_return_value_without_numbers_ends_every_rank_with_the_same_line(
    engines: list[Any], pairs: Pairs, function: Any, says: str, logits: bool
) -> None:
    def on(world: World) -> Any:
        loader = engine_runs.loader(pairs, world, True)
        return evaluate(
            engines[world.rank], loader, world, 3, name="odd", user=user(function, logits=logits)
        )

    first, second = on_ranks(2, on)
    assert isinstance(first, UserError)
    assert isinstance(second, UserError)
    assert str(first) == str(second)
    assert first.key == KEY
    assert str(first).startswith("evaluation.compute_metrics = 'mine': ")
    assert says in str(first)
    assert "evaluation of odd after step 3" in str(first)
    assert ("evaluation.logits=true" in str(first)) == (function is raising and not logits)
    assert isinstance(first.__cause__, IndexError if function is raising else type(None))


# --- before a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "objects", "key", "says"),
    [
        (
            {"logits": True},
            NOTHING,
            "evaluation.logits",
            "applies only with evaluation.compute_metrics",
        ),
        ({"batch_size": 2}, NOTHING, "evaluation.batch_size", "= 2: applies only"),
        ({"compute_metrics": "math:none"}, NOTHING, KEY, "has no none"),
        ({"compute_metrics": "math:pi"}, NOTHING, KEY, "cannot be called"),
        (
            {"compute_metrics": "math:fabs"},
            UserObjects(compute_metrics=math.fabs),
            KEY,
            "be combined with compute_metrics",
        ),
        (
            {"without_pairs": True},
            UserObjects(compute_metrics=raising),
            "compute_metrics",
            "needs evaluation pairs; set data.eval",
        ),
        (
            {"batch_eval_metrics": True},
            UserObjects(compute_metrics=raising),
            KEY,
            "an EvalPrediction and compute_result",
        ),
    ],
)
def test_compute_metrics_that_cannot_be_called_is_refused(
    tmp_path: Path, evaluation: dict[str, Any], objects: UserObjects, key: str, says: str
) -> None:
    data = {"data": {"eval": None}} if evaluation.pop("without_pairs", False) else {}
    with pytest.raises(UserError) as caught:
        user_metrics(tiny_spec(tmp_path, evaluation=evaluation, **data), objects, PAD)
    assert caught.value.key == key
    assert says in str(caught.value)


def test_a_class_is_built_and_batches_are_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("math.Keeps", Keeps, raising=False)
    evaluation = {"compute_metrics": "math:Keeps", "batch_eval_metrics": True}
    actual = user_metrics(tiny_spec(tmp_path, evaluation=evaluation), NOTHING, PAD)
    assert actual is not None
    assert isinstance(actual.function, Keeps)
    assert (actual.batch_size, actual.batched, actual.logits) == (2, True, False)


def test_more_logits_than_there_may_be_are_refused_with_the_cure(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, longest = tiny_spec(tmp_path), int((pairs.lengths[:, :1] + pairs.lengths[:, 1:]).max())
    monkeypatch.setattr(module, "MOST_BYTES", 2 * BATCH * longest * 300 * 4)
    check_memory(user(Keeps(), logits=True, batched=True), pairs, 300, "data.eval", spec)
    check_memory(user(Keeps()), pairs, 10**9, "data.eval", spec)
    with pytest.raises(
        UserError,
        match=r"evaluation.logits = True: .*data.eval.*evaluation.batch_eval_metrics=true",
    ):
        check_memory(user(Keeps(), logits=True), pairs, 300, "data.eval", spec)
    with pytest.raises(
        UserError, match=r"set evaluation.batch_size below 3, or data.max_length lower"
    ):
        check_memory(user(Keeps(), logits=True, batched=True), pairs, 301, "data.eval", spec)
