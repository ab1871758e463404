"""Whatever is combined trains as its own padded twin under DDP does, or is refused in one line:
losses and what changes them, references, engines, precisions, layouts, collators and LoRA, every
two of them together in some run on two real ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import make_spec
from orchestrator.settings.loss import OF_BATCH, OF_SCORES, LossType
from support.covering_array import Row, covering
from support.engine_runs import ENGINES
from support.gloo_ranks import Ranks
from support.tiny_parts import tiny_model, tokenizer
from support.tiny_settings import random_rows, raw_settings, write_jsonl
from support.worker_runs import (
    LORA,
    LOSS_NEEDS,
    PRECISIONS,
    QUANTISED_BASE,
    WITH_LORA,
    WholeRun,
    curve,
    tolerance,
    whole_run,
)

# steps of 4 and of 2 pairs; the third is in the second epoch, which asks a cache
STEPS, PAIRS = (3, 6)
SHARED = 1  # layers of 2
LIMIT_S = 60  # of a run; then its ranks are ended

NAMES = get_args(LossType)
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {  # what becomes of a loss
    "alone": {},
    "of shorter tails": {"dpo": {"ld_alpha": 0.5}},
    "by likelihood": {"dpo": {"use_weighting": True}},
    "of a divergence": {"dpo": {"f_divergence_type": "js_divergence"}},
    "of weighed pairs": {"data": {"weight_column": "weight", "margin_column": "margin"}},
}
BESIDE = {"of weighed pairs": ["support.user_losses:demanding"]}  # losses that are added
REFERENCES: dict[str, dict[str, Any]] = {
    "copy": {"cache": "off"},
    "copy, cached": {"cache": "lazy"},
    "copy, cached before": {"cache": "full"},
    "shared layers": {"kind": "shared_layers", "num_shared_layers": SHARED},
    "int8": {"kind": "int8"},
    "nf4": {"kind": "nf4"},
    "adapter off": {"kind": "adapter_off"},
    "precomputed": {"kind": "precomputed"},
}
COLLATORS = {
    "ours": None,
    "a user's": "support.user_collators:plain",
    "an aware one": "support.user_collators:aware",
    "TRL's": "trl.trainer.dpo_trainer:DataCollatorForPreference",
}
PARTS: dict[str, Sequence[str]] = {
    "objective": list(OBJECTIVES),
    "reference": list(REFERENCES),
    "engine": list(ENGINES),
    "precision": PRECISIONS,
    # packed, for either kernel; whatever another collator than ours makes is padded
    "layout": ["cpu", "sdpa", "padded"],
    "collator": list(COLLATORS),
    "lora": list(LORA),
}
DEEPSPEED, CUTTING, THEIRS = (
    {"zero1", "zero2", "zero3"},
    {"zero3", "fsdp"},
    {name for name in COLLATORS if name != "ours"},
)


class Refusal(NamedTuple):
    """Rows that cannot be, and why: they have one of these values in each of these parts."""

    parts: dict[str, set[str]]
    key: str
    rule: str


REFUSED = [
    Refusal(
        {"objective": {"of shorter tails"}, "loss": {"sft"}}, "dpo.ld_alpha", "is not used by sft"
    ),
    Refusal(
        {"objective": {"by likelihood"}, "loss": set(OF_BATCH)},
        "dpo.use_weighting",
        "compares sorted pairs",
    ),
    Refusal(
        {"objective": {"of a divergence"}, "loss": set(NAMES) - set(OF_SCORES)},
        "dpo.f_divergence_type",
        "works only for losses of the difference of a pair's scores",
    ),
    Refusal(
        {"precision": {"fp64"}, "engine": DEEPSPEED}, "precision", "deepspeed accumulates gradients"
    ),
    Refusal(
        {"lora": QUANTISED_BASE, "engine": CUTTING},
        "model.lora.base",
        "cannot shard quantised weights",
    ),
    Refusal(
        {"precision": {"fp64"}, "lora": {"lora on bf16"} | QUANTISED_BASE},
        "model.lora.base",
        "precision fp64 would compute with weights rounded to this type",
    ),
    Refusal(
        {"reference": {"shared layers"}, "lora": WITH_LORA},
        "reference.kind",
        "with model.lora every layer of the base can be shared",
    ),
    Refusal(
        {"reference": {"adapter off"}, "lora": {"none"}},
        "reference.kind",
        "there is no adapter to switch off",
    ),
    Refusal(
        {
            "reference": {"copy", "copy, cached", "copy, cached before", "int8", "nf4"},
            "lora": QUANTISED_BASE,
        },
        "reference.kind",
        "is frozen, so the reference needs no copy of it",
    ),
    Refusal(
        {"reference": {"int8", "nf4"}, "precision": {"fp64"}},
        "precision",
        "computes in 16 or 32 bits",
    ),
    Refusal(
        {"reference": {"precomputed"}, "collator": THEIRS},
        "reference.kind",
        "the batches of data.collator are not known in advance",
    ),
    Refusal(
        {"reference": {"copy, cached before"}, "collator": THEIRS},
        "reference.cache",
        "the batches of data.collator are not known in advance",
    ),
]


def refusals_of(row: Row) -> list[Refusal]:
    """Those that a row, or a part of one, meets."""
    return [
        each
        for each in REFUSED
        if all(row.get(part) in values for part, values in each.parts.items())
    ]


def is_refused(row: Row) -> bool:
    return bool(refusals_of(row))


def with_losses(rows: list[Row]) -> Iterator[Row]:
    """The losses go round; one that cannot be in a row waits for the next."""
    left: list[str] = []
    further = cycle(NAMES)
    for row in rows:
        while all(is_refused({"loss": name, **row}) for name in left):
            left.append(next(further))
        loss = next(name for name in left if not is_refused({"loss": name, **row}))
        left.remove(loss)
        yield {"loss": loss, **row}


# Every two values of all parts but the loss; of a dozen seeds the one with the fewest rows.
FIRST = list(with_losses(covering(PARTS, is_refused, seed=3)))
REST = covering({"loss": NAMES, **PARTS}, is_refused, begun=FIRST)


def settings(folder: Path, row: Row) -> dict[str, Any]:
    objective = OBJECTIVES[row["objective"]]
    return raw_settings(
        folder,
        run={"dir": str(folder), "name": name_of(row)},
        model={
            "init": None,
            "path": str(folder / "base"),
            "attention": row["layout"],
            "lora": LORA[row["lora"]],
        },
        reference=REFERENCES[row["reference"]],
        dpo={"loss_type": [row["loss"], *BESIDE.get(row["objective"], [])]}
        | LOSS_NEEDS.get(row["loss"], {})
        | objective.get("dpo", {}),
        engine=ENGINES[row["engine"]],
        precision=row["precision"],
        data={"eval": None, "collator": COLLATORS[row["collator"]], **objective.get("data", {})},
        batch={"global_batch_size": 4, "micro_batch_size": 1},
        training={"max_steps": STEPS, "logging_steps": 1},
        optimizer={"lr": 3e-3},
    )


def name_of(row: Row) -> str:
    return "-".join(row.values()).replace(", ", "_").replace(" ", "_").replace("'", "")


def twin(folder: Path, row: Row) -> dict[str, Any]:
    """The same in padded rows under DDP, collated by ours, judged by a full copy where there is
    one, without cache.
    """
    reference = "copy"
    if row["reference"] in ("int8", "nf4"):
        reference = row["reference"]
    elif row["lora"] in QUANTISED_BASE:
        reference = "adapter off"
    raw = settings(
        folder,
        row | {"engine": "ddp", "layout": "padded", "collator": "ours", "reference": reference},
    )
    raw["reference"] = raw["reference"] | {"cache": "off"}
    if row["reference"] == "shared layers":
        raw["model"]["num_frozen_layers"] = SHARED
    raw["run"]["name"] += "-twin"
    return raw


# --- what cannot be -------------------------------------------------------------------------------


def test_impossible_combinations_are_refused_with_a_reason_and_no_others(tmp_path: Path) -> None:
    """Before anything is built. The loss and what becomes of it have no part in what else is
    refused, a layout in nothing.
    """
    of_loss, usual = (
        ("loss", "objective"),
        {"loss": "sigmoid", **{part: values[0] for part, values in PARTS.items()}},
    )
    others = [part for part in PARTS if part not in (*of_loss, "layout")]
    met: set[str] = set()
    for parts in (of_loss, others):
        for values in product(*(({"loss": NAMES} | PARTS)[part] for part in parts)):
            row = usual | dict(zip(parts, values, strict=True))
            met |= rules_met(settings(tmp_path, row), row)
    assert met == {each.rule for each in REFUSED}
    for row in (*FIRST, *REST):
        make_spec(settings(tmp_path, row))


def rules_met(raw: dict[str, Any], row: Row) -> set[str]:
    """Those for which a row is refused; none where it is not."""
    expected = refusals_of(row)
    try:
        make_spec(raw)
    except UserError as error:
        refused = error
    else:
        assert not expected, f"{row} is not refused"
        return set()
    actual = {
        each.rule for each in expected if each.key == refused.key and each.rule in refused.rule
    }
    assert actual, f"{row} is refused: {refused}"
    assert "\n" not in str(refused)
    return actual


# --- what can be ----------------------------------------------------------------------------------

# a loss of squares of log-ratios, which others squash: how much less near its twins are
STEEPER = {"sppo_hard": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a model with its tokenizer."""
    root = tmp_path_factory.mktemp("combinations")
    weighed = [
        {**row, "weight": 0.5 + i, "margin": 0.1 * i}
        for i, row in enumerate(random_rows(PAIRS, longest=4))
    ]
    write_jsonl(root / "train.jsonl", weighed)
    tiny_model(hidden_size=64, initializer_range=0.1).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    return root


Pools = tuple[Ranks, Ranks]
"""Two ranks for rows, one for their twins."""


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    with Ranks(2) as both, Ranks(1) as alone:
        yield both, alone


def assert_trains_like_its_twin(pools: Pools, folder: Path, row: Row) -> None:
    actual: WholeRun
    actual, other = pools[0].call(whole_run, settings(folder, row), seconds=LIMIT_S)
    [expected] = pools[1].call(curve, twin(folder, row), seconds=LIMIT_S)
    near = tolerance(row["precision"], row["reference"], row["lora"]) * STEEPER.get(row["loss"], 1)
    assert actual == other
    assert len(actual.losses) == STEPS
    assert actual.losses == pytest.approx(expected, rel=near, abs=near)
    is_cached = row["reference"] != "copy" and row["collator"] == "ours"
    assert actual.kept == (PAIRS if is_cached else 0)


def every(rows: list[Row]) -> Callable[..., Any]:
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id="-".join(row.values())) for row in rows]
    )


@every(FIRST)
def test_allowed_combinations_train_like_their_twins(pools: Pools, folder: Path, row: Row) -> None:
    assert_trains_like_its_twin(pools, folder, row)


@pytest.mark.slow
@every(REST)
def test_every_loss_trains_like_its_twin_in_each_combination(
    pools: Pools, folder: Path, row: Row
) -> None:
    assert_trains_like_its_twin(pools, folder, row)
