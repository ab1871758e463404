"""References that move, are sharded or are a policy without its adapter, beside engines on two real
ranks: the curve is DDP's, resumed in the middle.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec
from support.debug_runs import finish_debug, run_debug
from support.engine_runs import ENGINES
from support.run_callbacks import stops_at
from support.run_files import losses
from support.tiny_parts import tiny_model, tokenizer
from support.tiny_settings import random_rows, write_jsonl, write_settings

STEPS, STOP, RANKS = 5, 2, 2
SHARING = {"kind": "shared_layers", "num_shared_layers": 1}
MOVING = {"sync_every": 2, "sync_alpha": 0.5}


class Kind(NamedTuple):
    """Settings, and the name of the kind whose curve under DDP it must have."""

    reference: dict[str, Any]
    model: dict[str, Any] = {}
    twin: str | None = None


KINDS = {
    "copy": Kind({}),
    "copy, sharded": Kind({"sharded": True}, twin="copy"),
    "shared layers": Kind(SHARING),
    "shared layers, sharded": Kind(SHARING | {"sharded": True}, twin="shared layers"),
    "adapter off": Kind({"kind": "adapter_off"}, {"lora": {"r": 4}}),
    "copy, synced": Kind(MOVING),
    "copy, sharded and synced": Kind(MOVING | {"sharded": True}, twin="copy, synced"),
    "shared layers, synced": Kind(SHARING | MOVING),
}
REFUSED = {  # (engine, kind): why
    (engine, kind): "does not shard weights"
    for engine in ("ddp", "zero1", "zero2")
    for kind, settings in KINDS.items()
    if settings.reference.get("sharded")
}
# Those of which a checkpoint or a shard holds something: a reference that moves or is cut, a
# policy's adapter alone. test_combinations.py has the others, undisturbed; stage 1 does as stage 2,
# where weights are whole as well.
RESUMED = [
    kind
    for kind, settings in KINDS.items()
    if {"sharded", "sync_every"} & settings.reference.keys()
]
RESUMED.append("adapter off")
CELLS = [
    (engine, kind)
    for engine in ("zero2", "zero3", "fsdp")
    for kind in RESUMED
    if (engine, kind) not in REFUSED
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine_references")
    write_jsonl(root / "train.jsonl", random_rows(16, longest=4))
    write_jsonl(root / "eval.jsonl", random_rows(4, seed=1, longest=4))
    tiny_model(hidden_size=64, initializer_range=0.1, num_hidden_layers=3).save_pretrained(
        root / "base"
    )
    tokenizer().save_pretrained(root / "base")
    return root


def settings_of(folder: Path, engine: str, kind: str, **blocks: Any) -> Path:
    name = f"{engine}-{kind}".replace(", ", "-").replace(" ", "_")
    return write_settings(
        folder,
        f"{name}.yaml",
        run={"dir": str(folder / name), "name": "run"},  # a cache of its own
        model={"init": None, "path": str(folder / "base")} | KINDS[kind].model,
        reference=KINDS[kind].reference,
        engine=ENGINES[engine],
        training={"max_steps": STEPS, "logging_steps": 1},
        batch={"global_batch_size": 4, "micro_batch_size": 1},
        optimizer={"lr": 3e-3},
        **blocks,
    )


@pytest.fixture(scope="module")
def curve(folder: Path) -> Callable[[str, str], dict[int, float]]:
    """(engine, kind) -> losses by step; of DDP undisturbed, of the others stopped and resumed."""

    @cache
    def of(engine: str, kind: str, stopped: bool) -> dict[int, float]:
        settings = settings_of(folder, engine, kind)
        if stopped:
            ended = run_debug(settings, stops_at(STOP), ranks=RANKS)
            assert ended.codes == [3] * RANKS, ended.log
        log = finish_debug(settings, ranks=RANKS)
        assert (f"resumed after step {STOP}" in log) is stopped
        return losses(Path(json.loads(settings.read_text())["run"]["dir"]) / "run")

    return lambda engine, kind: of(engine, kind, stopped=engine != "ddp")


@pytest.mark.parametrize(("engine", "kind"), CELLS)
def test_the_curve_is_that_of_ddp(curve: Any, engine: str, kind: str) -> None:
    expected = curve("ddp", KINDS[kind].twin or kind)
    assert len(expected) == STEPS
    assert curve(engine, kind) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in RESUMED if KINDS[kind].twin is None])
def test_curves_of_the_reference_kinds_differ(curve: Any, kind: str) -> None:
    """Else it would say little that a curve is its twin's."""
    copy = curve("ddp", "copy")
    assert max(abs(loss - copy[step]) for step, loss in curve("ddp", kind).items()) > 1e-4


@pytest.mark.parametrize(("engine", "kind"), REFUSED)
def test_other_references_are_refused_by_engines_that_shard(
    folder: Path, engine: str, kind: str
) -> None:
    with pytest.raises(UserError, match=REFUSED[engine, kind]):
        load_spec(settings_of(folder, engine, kind))
