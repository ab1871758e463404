"""Every kind of reference with every precision, layout, LoRA base and cache: refused with a cure,
or like its twin.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from orchestrator.data.refcache import RECORD
from orchestrator.run.local.debug import debug
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import Quantized
from orchestrator.settings.reference import CacheMode, ReferenceKind
from orchestrator.settings.run import RunSpec
from support.run_files import losses
from support.tiny_settings import TINY_MODEL, random_rows, tiny_spec, write_jsonl
from support.worker_runs import LORA, PRECISIONS, QUANTISED_BASE, WITH_LORA, tolerance

QUANTISED = set(get_args(Quantized))


class Combination(NamedTuple):
    """One cell of the matrix."""

    kind: str
    precision: str
    layout: str
    lora: str
    cache: str


MATRIX = [
    Combination(*cell)
    for cell in product(
        get_args(ReferenceKind),
        PRECISIONS,
        ["padded", "auto"],  # model.attention; auto packs
        LORA,
        get_args(CacheMode),
    )
]


class Refusal(NamedTuple):
    """Combinations that cannot be, why, and what can be instead."""

    # it is about those that have one of these values in each of these parts
    parts: dict[str, set[str]]
    key: str
    rule: str
    cure: str
    instead: dict[str, str]  # the parts after the cure


# In the order of the rules of the settings: of several the first speaks.
REFUSED = [
    Refusal(
        {"kind": {"precomputed"}, "cache": {"off"}},
        "reference.cache",
        "kind precomputed stores its log-probs in the cache",
        "remove reference.cache",
        {"cache": "lazy"},
    ),
    Refusal(
        {"precision": {"fp64"}, "lora": {"lora on bf16"} | QUANTISED_BASE},
        "model.lora.base",
        "precision fp64 would compute with weights rounded to this type",
        "remove it",
        {"lora": "lora"},
    ),
    Refusal(
        {"kind": {"shared_layers"}, "lora": WITH_LORA},
        "reference.kind",
        "with model.lora every layer of the base can be shared",
        "set reference.kind=adapter_off",
        {"kind": "adapter_off"},
    ),
    Refusal(
        {"kind": {"adapter_off"}, "lora": {"none"}},
        "reference.kind",
        "there is no adapter to switch off",
        "reference.kind=copy",
        {"kind": "copy"},
    ),
    Refusal(
        {"kind": {"copy", "int8", "nf4"}, "lora": QUANTISED_BASE},
        "reference.kind",
        "is frozen, so the reference needs no copy of it",
        "set reference.kind=adapter_off",
        {"kind": "adapter_off"},
    ),
    Refusal(
        {"kind": {"int8", "nf4"}, "precision": {"fp64"}},
        "precision",
        "computes in 16 or 32 bits",
        "set precision=fp32",
        {"precision": "fp32"},
    ),
]


def refusal_of(combination: Combination) -> Refusal | None:
    cell = combination._asdict()
    return next(
        (one for one in REFUSED if all(cell[part] in one.parts[part] for part in one.parts)), None
    )


# --- the runs -------------------------------------------------------------------------------------

PAIRS = 6  # steps of 4 and of 2 pairs; the third step is in the second epoch, which asks a cache
SHARED = 1  # layers of 2
# Weights so large that some activations pass 6, which int8 treats apart, and that the parts of a
# sum round.
MODEL = {**TINY_MODEL, "hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.22}
# how far a loss may be from the one with a full copy; seen 0.032 and 0.12
QUANTISATION = {"int8": 0.06, "nf4": 0.2}
LN2 = math.log(2)


class Run(NamedTuple):
    """Numbers that a run leaves."""

    losses: list[float]
    kept: int  # pairs whose log-probs are on disk


def settings(folder: Path, combination: Combination, frozen_layers: int | None = None) -> RunSpec:
    kind, precision, layout, lora, cache = combination
    return tiny_spec(
        folder,
        model={
            "init": {"model_type": "qwen2", "vocab_size": 300, "config": MODEL},
            "attention": layout,
            "lora": LORA[lora],
            "num_frozen_layers": frozen_layers,
        },
        reference={
            "kind": kind,
            "cache": cache,
            "num_shared_layers": SHARED if kind == "shared_layers" else None,
        },
        precision=precision,
        data={"eval": None},
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        training={"max_steps": 3, "logging_steps": 1},
        optimizer={"lr": 3e-3},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Train a combination, once; each has a folder of its own, so that none finds another's
    log-probs.
    """

    @cache
    def train(combination: Combination, frozen_layers: int | None = None) -> Run:
        folder = tmp_path_factory.mktemp("-".join(combination).replace(" ", "_"))
        write_jsonl(folder / "train.jsonl", random_rows(PAIRS))
        spec = settings(folder, combination, frozen_layers)
        debug(spec)
        kept = sum(path.stat().st_size for path in spec.cache_dir.glob("reference_logps/*/*.logps"))
        return Run(list(losses(spec.run_dir).values()), kept // RECORD.itemsize)

    return train


def twin_of(combination: Combination) -> tuple[Combination, int | None]:
    """The same in padded rows without cache, judged by a full copy where there is one, and its
    frozen layers.
    """
    kind = "copy"
    if combination.kind in QUANTISED:
        kind = combination.kind
    elif combination.lora in QUANTISED_BASE:
        kind = "adapter_off"
    frozen_layers = SHARED if combination.kind == "shared_layers" else None
    return combination._replace(kind=kind, layout="padded", cache="off"), frozen_layers


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", filter(refusal_of, MATRIX), ids="-".join)
def test_impossible_combinations_are_refused_with_a_reason_and_a_fix(
    tmp_path: Path, combination: Combination
) -> None:
    refusal = refusal_of(combination)
    assert refusal is not None
    with pytest.raises(UserError) as caught:
        settings(tmp_path, combination)
    assert caught.value.key == refusal.key
    assert refusal.rule in caught.value.rule
    assert refusal.cure in caught.value.cure


def sharing(combination: Combination) -> Any:
    """A parameter; combinations that may have a twin in common share a worker."""
    group = f"matrix, {combination.precision}, {combination.lora}"
    return pytest.param(combination, id="-".join(combination), marks=pytest.mark.xdist_group(group))


@pytest.mark.slow  # test_combinations.py has every two of these together
@pytest.mark.parametrize("combination", [sharing(c) for c in MATRIX if not refusal_of(c)])
def test_allowed_combinations_train_like_their_twins(
    trained: Callable[..., Run], combination: Combination
) -> None:
    run, twin = trained(combination), trained(*twin_of(combination))
    near = tolerance(combination.precision, combination.kind, combination.lora)
    assert len(run.losses) == 3
    assert run.losses == pytest.approx(twin.losses, abs=near)
    assert twin.losses[-1] < 0.6  # a reference that moved with the policy would leave ln 2
    assert run.kept == (0 if combination.cache == "off" else PAIRS)
    if combination.kind in QUANTISED:
        full_copy = trained(twin_of(combination)[0]._replace(kind="copy"))
        assert run.losses == pytest.approx(full_copy.losses, abs=QUANTISATION[combination.kind])
        assert run.losses[0] != LN2  # it is in fewer bits
    else:
        assert run.losses[0] == pytest.approx(LN2, abs=near)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.rule)
def test_each_fix_leads_to_settings_that_are_accepted(refusal: Refusal) -> None:
    """To something that runs, or to a later rule; and there is something that the refusal is
    about.
    """
    refused = [combination for combination in MATRIX if refusal_of(combination) is refusal]
    assert refused
    for combination in refused:
        after = refusal_of(combination._replace(**refusal.instead))
        assert after is None or REFUSED.index(after) > REFUSED.index(refusal)
