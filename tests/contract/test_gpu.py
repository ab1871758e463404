"""On one GPU every engine has the numbers of a CPU and resumes bit for bit, and a step does not
wait for the GPU.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import cli
from orchestrator.data.collate import Counts
from orchestrator.engines.precision import tf32_switched
from orchestrator.models import plain_head
from orchestrator.models.head import loss_in_head
from orchestrator.models.logps import body_hidden
from orchestrator.models.sums import PairSums
from orchestrator.settings.precision import Precision
from orchestrator.training.seen_pairs import SeenPairs
from orchestrator.world import World
from support import engine_cases, engine_runs
from support.engine_cases import SAVED
from support.engine_runs import ENGINES, Case
from support.run_callbacks import stops_at
from support.run_files import losses
from support.tiny_parts import pair_batch, tiny_model
from support.tiny_settings import write_settings

GPU = torch.device("cuda", 0)
STEPS = 6
# of a loss, relative
NEAR: dict[Precision, float] = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05, "fp16": 0.05}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def needs(engine: str) -> None:
    if ENGINES[engine]["kind"] == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


@pytest.fixture
def alone() -> Iterator[World]:
    world = World(0, 1, 0, GPU)
    yield world
    world.leave()


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


every_engine = pytest.mark.parametrize("engine", ENGINES)
every_precision = pytest.mark.parametrize("precision", NEAR)


@every_engine
@every_precision
def test_the_curve_is_that_of_a_cpu(alone: World, engine: str, precision: Precision) -> None:
    needs(engine)
    case = Case(engine=engine, precision=precision)
    with tf32_switched(precision == "tf32"):
        ddp = engine_runs.engine_of(case, alone)
        if precision == "fp16":
            ddp.scale.value = 2.0**8  # at which no step of this model is skipped
        taken = [engine_runs.take_step(ddp, case, step, alone) for step in range(STEPS)]
    assert not any(updated.skipped for _, updated in taken)
    expected = engine_runs.oracle(Case(), range(STEPS)).losses
    assert [loss for loss, _ in taken] == pytest.approx(expected, rel=NEAR[precision])
    ddp.close()


def test_products_are_in_tf32_only_where_that_was_asked_for() -> None:
    """Also where a library has switched it on."""
    a, b = (torch.randn(512, 512, device=GPU) for _ in range(2))
    exact, errors = a.double() @ b.double(), []
    with tf32_switched(True):
        for on in (True, False):
            with tf32_switched(on):
                errors.append(((a @ b).double() - exact).abs().max().item())
    assert errors[0] > 1e-3 > 1e-4 > errors[1]


@every_engine
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_on_the_same_engine_is_bitwise(
    alone: World, deterministic: None, tmp_path: Path, engine: str, precision: Precision
) -> None:
    needs(engine)
    case = Case(engine=engine, precision=precision)
    first = engine_runs.engine_of(case, alone)
    engine_runs.train(first, case, alone, range(SAVED))
    checkpoint = engine_runs.kept(first, alone, tmp_path, SAVED)
    gone_on = engine_runs.train(first, case, alone, range(SAVED, engine_cases.STEPS))
    first.close()
    again, resumed = engine_cases.resumed(alone, case, checkpoint)
    again.close()
    assert resumed == gone_on


@pytest.mark.parametrize("precision", NEAR)
def test_a_step_does_not_wait_for_the_gpu(alone: World, precision: Precision) -> None:
    """Between two logs the host looks at nothing but whether the gradient is finite."""
    case = Case(precision=precision)
    engine = engine_runs.engine_of(case, alone)
    engine_runs.take_step(engine, case, 0, alone)  # makes the optimizer's state
    batches = engine_runs.micro_batches(case, 1, alone)
    on_host = [batch.to(torch.device("cpu")) for batch in batches]
    torch.cuda.synchronize()
    seen = SeenPairs(engine.step.dpo)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [
            engine.micro_step(batch, Counts(case.pairs, 1), last=number == len(batches) - 1)
            for number, batch in enumerate(batches)
        ]
        finite = engine.grads_finite()
        engine.optimizer_step(apply=True)
        seen.add(1, 0, list(zip(on_host, outputs, strict=True)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finite.item()
    assert (
        seen.take()["loss"].to_pylist() == torch.cat([output.losses for output in outputs]).tolist()
    )


@pytest.mark.parametrize("rows_at_once", [2**20, 8])
def test_the_loss_in_the_head_is_that_of_a_cpu_in_fp64(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_head, "CHUNK_LOGITS", 300 * rows_at_once)
    monkeypatch.setattr(plain_head, "ON_GPU", 1)
    collected = []
    for device, dtype in ((torch.device("cpu"), torch.float64), (GPU, torch.float32)):
        model: Any = tiny_model(0, torch.float32, tie_word_embeddings=False).to(device, dtype)
        batch = pair_batch(5).to(device)
        hidden = body_hidden(model, batch).detach().requires_grad_()

        def pair_losses(_: slice, sums: PairSums) -> torch.Tensor:
            assert sums.aligned is not None
            margin = 0.1 * (sums.logps[:, 0] - sums.logps[:, 1])
            return -torch.nn.functional.logsigmoid(margin) / 5 * sums.aligned.sum(1).exp()

        scored = loss_in_head(
            model, hidden, batch, pair_losses, True, ld_alpha=0.4, with_aligned=True
        )
        scored.loss.backward()
        assert scored.tokens is not None
        values = [scored.loss, scored.logps, *scored.tokens, hidden.grad, model.lm_head.weight.grad]
        collected.append([each.detach().double().cpu() for each in values])
    for exact, on_gpu in zip(*collected, strict=True):
        assert (on_gpu - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_a_resumed_run_on_a_gpu_is_bitwise(deterministic: None, tmp_path: Path) -> None:
    """`orchestrator debug`, in bf16, stopped and resumed."""
    settings = write_settings(
        tmp_path, precision="bf16", training={"max_steps": 6}, evaluation={"every_steps": 2}
    )
    assert cli.main(["debug", str(settings), "run.name=whole"]) == cli.DONE
    assert cli.main(["debug", str(settings), "run.name=stopped", stops_at(3)]) == cli.STOPPED
    (tmp_path / "runs" / "stopped" / "STOP").unlink(missing_ok=True)
    assert cli.main(["debug", str(settings), "run.name=stopped"]) == cli.DONE
    whole, stopped = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    assert losses(stopped) == losses(whole)
    weights = "model/model.safetensors"
    assert (stopped / weights).read_bytes() == (whole / weights).read_bytes()
