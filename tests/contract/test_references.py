"""Every kind of reference trains as a frozen copy does, on one rank or two, and resumed in the
middle.
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from support.debug_runs import finish_debug, run_debug
from support.run_callbacks import stops_at
from support.run_files import losses, metric_lines
from support.run_hooks import watch
from support.tiny_parts import save_adapter, tiny_model, tokenizer
from support.tiny_settings import random_rows, write_jsonl, write_settings

# 16 pairs by 4: the second epoch, whose log-probs are known, begins at step 5
STEPS, STOP, SYNC = (6, 3, 2)
RESUMED = 2  # ranks
LAYERS, FROZEN = 3, 2
FREEZING: dict[str, Any] = {"num_frozen_layers": FROZEN}
SHARING: dict[str, Any] = {"kind": "shared_layers", "num_shared_layers": FROZEN}
MOVING: dict[str, Any] = {"sync_every": SYNC, "sync_alpha": 0.5}
ADAPTER_OFF: dict[str, Any] = {"kind": "adapter_off"}
NEW_ADAPTER: dict[str, Any] = {"lora": {"r": 4}}
OLD_ADAPTER: dict[str, Any] = {"lora": {"adapter_path": "adapter"}}


class Kind(NamedTuple):
    """Settings of a run, and the name of the one with a plain copy whose curve it must have."""

    reference: dict[str, Any] = {}
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    twin: str | None = None


KINDS = {
    "copy": Kind(),
    "copy, layers frozen": Kind(model=FREEZING),
    "copy, new adapter": Kind(model=NEW_ADAPTER),
    "copy, old adapter": Kind(model=OLD_ADAPTER),
    "copy, synced": Kind(MOVING),
    "copy, layers frozen, synced": Kind(MOVING, FREEZING),
    "copy, offloaded": Kind({"offload": True}, twin="copy"),
    "copy, offloaded, synced": Kind({"offload": True} | MOVING, twin="copy, synced"),
    "shared": Kind(SHARING, twin="copy, layers frozen"),
    "shared, checkpointing": Kind(
        SHARING, training={"gradient_checkpointing": True}, twin="copy, layers frozen"
    ),
    "shared, synced": Kind(SHARING | MOVING, twin="copy, layers frozen, synced"),
    "int8": Kind({"kind": "int8"}),
    "nf4": Kind({"kind": "nf4"}),
    "adapter off": Kind(ADAPTER_OFF, NEW_ADAPTER, twin="copy, new adapter"),
    "adapter off, old adapter": Kind(ADAPTER_OFF, OLD_ADAPTER, twin="copy, old adapter"),
    "precomputed": Kind({"kind": "precomputed"}, twin="copy"),
}


def params(kind: str, *more: Any) -> Any:
    """Parameters of a test; those of twins share a worker, as they share runs."""
    return pytest.param(
        kind, *more, marks=pytest.mark.xdist_group(f"references, {KINDS[kind].twin or kind}")
    )


every_kind = pytest.mark.parametrize("kind", [params(kind) for kind in KINDS])
any_ranks = pytest.mark.parametrize("ranks", [1, 2])


class Run(NamedTuple):
    """A run that has come to its end."""

    folder: Path
    log: str  # of the last attempt

    def watched(self, rank: int) -> list[dict[str, Any]]:
        """Return the lines that `watch` wrote; a step appears twice where the run was resumed."""
        return [
            json.loads(line)
            for line in (self.folder / f"watched{rank}.jsonl").read_text().splitlines()
        ]


Runs = Callable[..., Run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(kind, ranks, stopped) -> that run; trained once, with a cache of its own."""
    folder = tmp_path_factory.mktemp("references")
    write_jsonl(folder / "train.jsonl", random_rows(16, longest=4))
    write_jsonl(folder / "eval.jsonl", random_rows(4, seed=1, longest=4))
    tiny_model(num_hidden_layers=LAYERS, hidden_size=64, initializer_range=0.1).save_pretrained(
        folder / "base"
    )
    tokenizer().save_pretrained(folder / "base")
    save_adapter(folder / "base", folder / "adapter")

    @cache
    def build_run(kind: str, ranks: int, stopped: bool = False) -> Run:
        reference, of_model, training, _ = KINDS[kind]
        if of_model is OLD_ADAPTER:
            of_model = {"lora": {"adapter_path": str(folder / "adapter")}}
        name = f"{kind.replace(', ', '-').replace(' ', '_')}-{ranks}{'-stopped' if stopped else ''}"
        settings = write_settings(
            folder,
            f"{name}.yaml",
            run={"dir": str(folder / name), "name": "run"},
            model={"init": None, "path": str(folder / "base")} | of_model,
            reference=reference,
            training={"max_steps": STEPS, "logging_steps": 1} | training,
            batch={"global_batch_size": 4, "micro_batch_size": 2},
            optimizer={"lr": 3e-3},
        )
        if stopped:
            ended = run_debug(settings, stops_at(STOP), ranks=ranks, hook=watch)
            assert ended.codes == [3] * ranks, ended.log
        return Run(folder / name / "run", finish_debug(settings, ranks=ranks, hook=watch))

    return build_run


def curve(run: Run) -> dict[tuple[int, str], float]:
    """Each loss, of training and evaluation, by step."""
    lines = metric_lines(run.folder)
    return {
        (line["step"], name): line[name]
        for line in lines
        for name in ("loss", "eval_loss")
        if name in line
    }


# --- the curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        params(name, ranks)
        for name, kind in KINDS.items()
        for ranks in (1, 2)
        if kind.twin or ranks > 1
    ],
)
def test_the_curve_is_that_of_a_copy_on_one_rank(runs: Runs, kind: str, ranks: int) -> None:
    twin = runs(KINDS[kind].twin or kind, 1)
    assert len(losses(twin.folder)) == STEPS
    assert curve(runs(kind, ranks)) == pytest.approx(curve(twin), abs=1e-5)


@pytest.mark.parametrize(
    "kind", [params(name) for name, kind in KINDS.items() if name != "copy" and not kind.twin]
)
def test_curves_of_different_references_are_far_apart(runs: Runs, kind: str) -> None:
    """Else it would say little that a curve is its twin's."""
    plain = curve(runs("copy", 1))
    assert max(abs(loss - plain[key]) for key, loss in curve(runs(kind, 1)).items()) > 5e-4


@any_ranks
@pytest.mark.parametrize("kind", [params(kind) for kind in KINDS if kind not in ("int8", "nf4")])
def test_a_run_begins_at_ln_2(runs: Runs, kind: str, ranks: int) -> None:
    assert losses(runs(kind, ranks).folder)[1] == pytest.approx(math.log(2), abs=1e-9)


@any_ranks
@pytest.mark.parametrize("kind", [params("int8"), params("nf4")])
def test_a_quantised_reference_starts_within_its_measured_error(
    runs: Runs, kind: str, ranks: int
) -> None:
    run = runs(kind, ranks)
    match = re.search(r"reward margins by at most (\S+)", run.log)
    assert match
    margin = 1.05 * float(match[1])  # it is printed in two digits
    first = next(line for line in metric_lines(run.folder) if line["step"] == 1)
    assert 0 < abs(first["loss"] - math.log(2)) <= margin
    assert 0 < abs(first["rewards/margins"]) <= margin


# --- resumed in the middle ------------------------------------------------------------------------


@every_kind
def test_a_run_resumed_in_the_middle_is_bitwise_the_undisturbed_one(runs: Runs, kind: str) -> None:
    whole, resumed = runs(kind, RESUMED), runs(kind, RESUMED, stopped=True)
    assert f"resumed after step {STOP}" in resumed.log
    assert curve(resumed) == curve(whole)
    weights, expected = (
        load_file(run.folder / "model" / "model.safetensors") for run in (resumed, whole)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


# --- what moves -----------------------------------------------------------------------------------


def is_frozen(kind: Kind, parameter: str) -> bool:
    if "lora" in kind.model:
        return ".lora_" not in parameter or ".policy." not in parameter
    if "num_frozen_layers" in kind.model or "num_shared_layers" in kind.reference:
        return "embed_tokens" in parameter or any(
            f".layers.{layer}." in parameter for layer in range(FROZEN)
        )
    return False


@every_kind
def test_only_weights_that_are_not_frozen_change(runs: Runs, kind: str) -> None:
    whole, resumed = runs(kind, RESUMED), runs(kind, RESUMED, stopped=True)
    lines = resumed.watched(0)
    assert [line["step"] for line in lines] == [*range(STOP + 1), *range(STOP, STEPS + 1)]
    assert {line["step"]: line for line in lines} == {
        line["step"]: line for line in whole.watched(0)
    }
    assert all(resumed.watched(rank) == lines for rank in range(RESUMED))
    for name, first in lines[0]["policy"].items():
        if is_frozen(KINDS[kind], name):
            assert {line["policy"][name] for line in lines} == {first}, name
        else:
            assert lines[-1]["policy"][name] != first, name


@every_kind
def test_the_reference_stays_between_two_syncs(runs: Runs, kind: str) -> None:
    lines = runs(kind, RESUMED, stopped=True).watched(0)
    by_epoch: dict[int, set[str | None]] = {}
    for line in lines:
        epoch = line["step"] // SYNC if "sync_every" in KINDS[kind].reference else 0
        by_epoch.setdefault(epoch, set()).add(line["reference"])
    assert all(len(hashes) == 1 for hashes in by_epoch.values())
    assert len(set.union(*by_epoch.values())) == len(by_epoch)
    assert (lines[0]["reference"] is None) == (kind == "precomputed")  # it is gone
