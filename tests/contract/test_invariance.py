"""The step depends on the global batch alone: ranks, micro-batches, engines' sharding and collators
leave no trace.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

from orchestrator.settings.loss import LossType
from support import worker_runs
from support.debug_runs import finish_debug
from support.gloo_ranks import Ranks
from support.run_files import losses, metric_lines
from support.tiny_parts import tiny_model, tokenizer
from support.tiny_settings import random_rows, raw_settings, write_jsonl, write_settings

# 30 pairs in batches of 8: the last batch of an epoch has 6, which neither 4 ranks nor
# micro-batches of 4 divide
SETTINGS: dict[str, Any] = {
    # every gradient is clipped
    "training": {"max_steps": 9, "logging_steps": 1, "max_grad_norm": 0.05},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "evaluation": {"every_steps": 3},
    "scheduler": {"name": "cosine", "warmup_steps": 3},
    "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
}
TOKEN_BUDGET = ["batch.micro_batch_size=null", "batch.max_tokens_per_microbatch=150"]
CUTS = {
    "1x4": (1, ["batch.micro_batch_size=2"]),
    "1x1": (1, ["batch.micro_batch_size=8"]),
    "2x2": (2, ["batch.micro_batch_size=2"]),
    "4x1": (4, ["batch.micro_batch_size=2"]),
    "3 ranks": (3, ["batch.micro_batch_size=1"]),
    "more ranks than pairs": (
        3,
        ["batch.global_batch_size=2", "batch.micro_batch_size=1", "training.max_steps=9"],
    ),
    "token budget": (2, TOKEN_BUDGET),
    "checkpointing": (2, ["training.gradient_checkpointing=true"]),
    "padded": (2, ["model.attention=padded"]),
    "padded token budget": (1, [*TOKEN_BUDGET, "model.attention=padded"]),
    "sdpa": (1, ["model.attention=sdpa"]),
    "cache off": (2, ["reference.cache=off"]),
    "cache full": (2, ["reference.cache=full"]),
}
SPLITS = ["2x2", "4x1"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariance")
    path = write_settings(folder, **SETTINGS)
    train = folder / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:30]))
    return path


def run(
    settings: Path, name: str, ranks: int, overrides: list[str], extra: dict[str, str] | None = None
) -> Path:
    name = name.replace(" ", "-")
    # a run that finds another's reference log-probs would not make its own
    own = f"run.dir={settings.parent / name}"
    words = [own, f"run.name={name}", *overrides]
    finish_debug(settings, *words, ranks=ranks, cwd=settings.parent, env=extra)
    return settings.parent / name / name


def evaluations(run_dir: Path) -> list[float]:
    return [line["eval_loss"] for line in metric_lines(run_dir) if "eval_loss" in line]


@pytest.mark.parametrize("cut", [name for name in CUTS if name != "1x4"])
def test_same_curve_and_weights(settings: Path, cut: str) -> None:
    ranks, overrides = CUTS[cut]
    batch = [word for word in overrides if word.startswith("batch.global")]
    twin_name = f"one-process{'-small' if batch else ''}"
    twin = settings.parent / twin_name / twin_name
    if not twin.exists():
        run(settings, twin_name, 1, CUTS["1x4"][1] + batch)
    actual = run(settings, cut, ranks, overrides)

    assert losses(actual) == pytest.approx(losses(twin), abs=1e-5)
    assert evaluations(actual) == pytest.approx(evaluations(twin), abs=1e-6)
    for line, expected in zip(metric_lines(actual), metric_lines(twin), strict=True):
        assert set(line) == set(expected)
        for name in ("rewards/accuracies", "num_tokens", "learning_rate", "epoch"):
            assert line.get(name, 0) == pytest.approx(expected.get(name, 0)), name
        for name in (
            "grad_norm",
            "rewards/margins",
            "logps/chosen",
            "logits/chosen",
            "entropy",
            "mean_token_accuracy",
        ):
            assert line.get(name, 0) == pytest.approx(expected.get(name, 0), rel=1e-4, abs=1e-5), (
                name
            )
    weights, expected_weights = (
        load_file(d / "model" / "model.safetensors") for d in (actual, twin)
    )
    for name, value in expected_weights.items():
        assert (weights[name] - value).abs().max() < 1e-5, name


OF_THE_GLOBAL_BATCH = {
    "sft": ["dpo.loss_type=sft"],
    "mpo": [
        "dpo.loss_type=[robust,bco_pair,sft]",
        "dpo.loss_weights=[0.8,0.2,1]",
        "dpo.label_smoothing=0.1",
    ],
    "aot": ["dpo.loss_type=[aot,aot_unpaired,sft]", "dpo.label_smoothing=0.1"],
}


@pytest.mark.parametrize("loss", OF_THE_GLOBAL_BATCH)
def test_token_means_and_sorting_cover_the_global_batch(settings: Path, loss: str) -> None:
    """A mean over tokens, and the sorting of pairs.

    Five steps of 8 and 6 pairs, evaluated before, within and after.
    """
    short = [*OF_THE_GLOBAL_BATCH[loss], "training.max_steps=5"]
    twin, *actual = (
        run(settings, f"{loss} {cut}", CUTS[cut][0], [*CUTS[cut][1], *short])
        for cut in ("1x4", *SPLITS)
    )
    for each in actual:
        assert losses(each) == pytest.approx(losses(twin), abs=1e-5)
        assert evaluations(each) == pytest.approx(evaluations(twin), abs=1e-6)
    assert len(evaluations(twin)) == 3
    assert losses(twin)[5] < losses(twin)[1]


# --- every objective ------------------------------------------------------------------------------

OBJECTIVES: dict[str, dict[str, Any]] = {
    **{
        loss: {"loss_type": loss, **worker_runs.LOSS_NEEDS.get(loss, {})}
        for loss in get_args(LossType)
    },
    "ld_alpha, use_weighting": {
        "loss_type": ["hinge", "sft"],
        "ld_alpha": 0.3,
        "use_weighting": True,
    },
    "own, f-divergence, weighed pairs": {
        "loss_type": ["support.user_losses:demanding", "sigmoid", "sft"],
        "f_divergence_type": "forward_kl",
        "use_weighting": True,
    },
    "aot, sft, ld_alpha, weighed pairs": {
        "loss_type": ["aot", "sigmoid_norm", "sft", "aot_unpaired"],
        "loss_weights": [0.5, 1.0, 0.2, 2.0],
        "ld_alpha": 0.6,
    },
}
WEIGHED = {"weight_column": "weight", "margin_column": "margin"}
RANKS = {1: 2, 2: 2, 4: 2, 3: 1}
"""Pairs of a micro-batch, of 8 in a step: 1x4, 2x2, 4x1 (ranks x accumulation), 3 ranks."""
LAYOUTS = {"packed": "cpu", "padded": "padded"}
Curves = dict[tuple[int, str, str], list[float]]
"""By ranks, layout and objective."""


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """Three steps of 8, 6 and 8 pairs in fp64, of every objective, on ranks that stay."""
    folder = tmp_path_factory.mktemp("losses")
    weighed = [
        {**row, "weight": 0.25 + i % 5, "margin": 0.1 * i}
        for i, row in enumerate(random_rows(14, longest=4))
    ]
    write_jsonl(folder / "train.jsonl", weighed)
    tiny_model(initializer_range=0.1, num_hidden_layers=1).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    values: Curves = {}
    for ranks, micro in RANKS.items():
        cells = [(layout, name) for layout in LAYOUTS for name in OBJECTIVES]
        settings = [
            raw_settings(
                folder,
                run={
                    "dir": str(folder),
                    "name": f"{ranks}-{layout}-{name}".replace(", ", "-").replace(" ", "_"),
                },
                model={"init": None, "path": str(folder / "base"), "attention": LAYOUTS[layout]},
                data={"eval": None, **(WEIGHED if "weighed pairs" in name else {})},
                dpo=OBJECTIVES[name],
                batch={"global_batch_size": 8, "micro_batch_size": micro},
                training={"max_steps": 3, "logging_steps": 1},
                optimizer={"lr": 3e-3},
                precision="fp64",
            )
            for layout, name in cells
        ]
        with Ranks(ranks) as group:
            actual = group.call(worker_runs.curves, settings)
        assert all(each == actual[0] for each in actual)
        values |= {(ranks, *cell): curve for cell, curve in zip(cells, actual[0], strict=True)}
    return values


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_is_equal_for_any_ranks_and_layout(curves: Curves, name: str) -> None:
    expected = curves[1, "packed", name]
    assert len(set(expected)) == 3
    for ranks in RANKS:
        for layout in LAYOUTS:
            assert curves[ranks, layout, name] == pytest.approx(expected, rel=1e-9), (ranks, layout)


# --- collators ------------------------------------------------------------------------------------


def test_collators_get_rank_world_step_and_global_counts(settings: Path, tmp_path: Path) -> None:
    """2 ranks x 2 micro-batches: each call sees its rank, the world, the step, and the global
    batch's counts.
    """
    overrides = ["data.eval=null", "evaluation.every_steps=null", "training.max_steps=3"]
    ours = run(settings, "ours", 2, overrides)
    plain = run(settings, "plain", 2, [*overrides, "data.collator=support.user_collators:plain"])
    seen = {"SEEN": str(tmp_path / "seen")}
    aware = run(
        settings, "aware", 2, [*overrides, "data.collator=support.user_collators:aware"], seen
    )
    assert losses(plain) == pytest.approx(losses(ours), abs=1e-6)
    assert losses(aware) == pytest.approx(losses(ours), abs=1e-6)
    tokens = {line["step"]: line["num_tokens"] for line in metric_lines(aware)}

    calls = [
        json.loads(line)
        for rank in (0, 1)
        for line in (tmp_path / f"seen.{rank}").read_text().splitlines()
    ]
    # a loader may run a step ahead of the last update
    by_step = {step: [call for call in calls if call["step"] == step] for step in (1, 2, 3)}
    for step, calls in by_step.items():
        assert {call["world_size"] for call in calls} == {2}
        assert {call["rank"] for call in calls} == {0, 1}
        assert {call["global_pairs"] for call in calls} == {8}
        pairs = [pair for call in calls for pair in call["pairs"]]
        # a rank with fewer micro-batches repeats a cheap pair, weightless
        fillers = len(pairs) - len(set(pairs))
        assert len(set(pairs)) == 8
        assert {call["rank"] for call in calls if len(call["pairs"])} == {0, 1}
        if not fillers:
            assert {call["global_tokens"] for call in calls} == {
                sum(call["tokens"] for call in calls)
            }
        assert calls[0]["global_tokens"] == tokens[step] - tokens.get(step - 1, 0)
