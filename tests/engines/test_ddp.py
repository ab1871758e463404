"""The engine at one rank, on packed pairs: clipping, schedule, loss scale, and a state that comes
back bit for bit.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.data.collate import Counts
from orchestrator.dpo.step import PairStep
from orchestrator.engines.base import Shard, StepResult
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.models.reference import Reference
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.optim import ELEMENTWISE_OPTIMIZERS, OptimizerSpec, SchedulerSpec
from orchestrator.settings.precision import Precision
from orchestrator.training.checkpoint_reader import Reader
from orchestrator.training.checkpoint_writer import save
from support.tiny_parts import ALONE, both_layouts
from support.tiny_parts import pair_batch as made_batch
from support.tiny_parts import tiny_model as made_model

COUNTS = Counts(4, 1)
SGD = {"name": "torch.optim.SGD", "lr": 1.0}
CONSTANT: dict[str, Any] = {"name": "constant"}
pair_batch, tiny_model = partial(made_batch, packed=True), partial(made_model, packed=True)


def engine(
    optimizer: dict[str, Any],
    schedule: dict[str, Any] | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    max_grad_norm: float | None = None,
    model: Any = None,
) -> DdpEngine:
    ddp = DdpEngine(EngineSpec(), ALONE, precision, max_grad_norm, 0.01)
    policy = tiny_model(seed) if model is None else model
    step = PairStep(policy, Reference(tiny_model(1)), DpoSpec(beta=2.0))
    spec = SchedulerSpec(**(schedule or CONSTANT))
    ddp.wrap(step, optimizer_factory(OptimizerSpec(**optimizer)), scheduler_factory(spec, 10))
    return ddp


def train(ddp: DdpEngine, steps: int = 1, seed: int = 0) -> list[StepResult]:
    """Steps of two micro-batches each."""
    done = []
    for step in range(steps):
        for micro in range(2):
            ddp.micro_step(pair_batch(2, seed + 10 * step + micro), COUNTS, last=micro == 1)
        done.append(ddp.optimizer_step(apply=bool(ddp.grads_finite())))
    return done


def weights(ddp: DdpEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in ddp.saved.values()])


def gradient(ddp: DdpEngine) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in ddp.saved.values() if p.grad is not None])


def restored(ddp: DdpEngine, other: DdpEngine, folder: Path) -> DdpEngine:
    """Put one engine's state into another, by way of a checkpoint."""
    reader = Reader(save(folder, 1, ddp.iter_shards(), {"engine": ddp.state()}, ALONE))
    other.load_shards(reader.read, reader.keys)
    other.set_state(reader.meta["engine"])
    return other


def test_the_engine_does_not_divide_the_gradient() -> None:
    ddp, plain = engine(SGD), engine(SGD)
    for seed in (0, 1):
        output = ddp.micro_step(pair_batch(2, seed), COUNTS, last=seed == 1)
        plain.step(pair_batch(2, seed), COUNTS).loss.backward()
        assert not output.loss.requires_grad
    assert torch.equal(gradient(ddp), gradient(plain))
    before, applied = weights(ddp), gradient(ddp)
    assert bool(ddp.grads_finite())
    updated = ddp.optimizer_step(apply=True)
    decay = torch.cat(
        [torch.full((p.numel(),), 0.01 if p.ndim > 1 else 0.0) for p in ddp.saved.values()]
    )
    assert torch.allclose(weights(ddp), before - applied - decay * before, atol=1e-7)
    assert updated.grad_norm.item() == pytest.approx(applied.norm().item(), rel=1e-6)
    assert (updated.lr, updated.skipped) == (1.0, False)


@pytest.mark.parametrize(("limit", "expected"), [(0.01, 0.01), (1e6, None), (None, None)])
def test_the_gradient_is_clipped_and_its_norm_is_reported_before(
    limit: float | None, expected: float | None
) -> None:
    ddp = engine({**SGD, "lr": 1.0}, max_grad_norm=limit)
    ddp.weight_decay = 0.0
    for group in ddp.optimizer.param_groups:
        group["weight_decay"] = 0.0
    ddp.micro_step(pair_batch(4), COUNTS, last=True)
    norm, before = gradient(ddp).norm().item(), weights(ddp)
    assert norm > 0.1
    assert bool(ddp.grads_finite())
    assert ddp.optimizer_step(apply=True).grad_norm.item() == pytest.approx(norm, rel=1e-6)
    assert (weights(ddp) - before).norm().item() == pytest.approx(expected or norm, rel=1e-3)


@pytest.mark.parametrize("apply", [True, False])
def test_the_gradient_is_gone_after_the_step(apply: bool) -> None:
    ddp = engine(SGD)
    before = weights(ddp)
    ddp.micro_step(pair_batch(4), COUNTS, last=True)
    ddp.grads_finite()
    ddp.optimizer_step(apply=apply)
    assert all(p.grad is None for p in ddp.saved.values())
    assert torch.equal(weights(ddp), before) is not apply


def test_a_discarded_micro_step_leaves_nothing() -> None:
    ddp, plain = engine(SGD), engine(SGD)
    ddp.micro_step(pair_batch(4, 5), COUNTS, last=True)
    ddp.drop_gradients()
    train(ddp)
    train(plain)
    assert torch.equal(weights(ddp), weights(plain))


def test_the_schedule_moves_with_applied_steps_only() -> None:
    ddp = engine(
        SGD, {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}}
    )
    used = []
    for apply in (True, False, False, True, True):
        ddp.micro_step(pair_batch(4), COUNTS, last=True)
        ddp.grads_finite()
        updated = ddp.optimizer_step(apply=apply)
        used.append((updated.lr, updated.skipped))
    assert used == [(1.0, False), (0.5, True), (0.5, True), (0.5, False), (0.25, False)]


@both_layouts
def test_reference_log_probs_alone_equal_those_of_a_step(packed: bool) -> None:
    ddp, batch = engine(SGD), pair_batch(4, packed=packed)
    actual = ddp.reference_logps(batch)
    assert not actual.requires_grad
    assert torch.equal(actual, ddp.micro_step(batch, COUNTS, last=True).ref_logps)
    assert torch.equal(actual, ddp.evaluate(batch, COUNTS).ref_logps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_detected(value: float) -> None:
    ddp = engine(SGD)
    ddp.micro_step(pair_batch(4), COUNTS, last=True)
    grad = ddp.saved["model.layers.1.mlp.up_proj.weight"].grad
    assert grad is not None
    grad[3, 5] = value
    assert not bool(ddp.grads_finite())


def test_an_fp16_overflow_lowers_the_scale_and_keeps_weights_and_rate() -> None:
    ddp = engine(
        {"name": "torch.optim.AdamW", "lr": 1e-3},
        {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 1, "gamma": 0.5}},
        precision="fp16",
    )
    ddp.scale.value = 2.0**60
    before = weights(ddp)
    for skipped in range(1, 4):
        [updated] = train(ddp)
        assert updated.skipped
        assert updated.lr == 1e-3
        assert not updated.grad_norm.isfinite()
        assert ddp.scale.value == 2.0 ** (60 - skipped)
    assert torch.equal(weights(ddp), before)
    assert not any(ddp.optimizer.state.values())
    ddp.scale.value = 128.0
    [updated] = train(ddp)
    assert (updated.skipped, updated.lr) == (False, 1e-3)
    assert ddp.scheduler.get_last_lr()[0] == 5e-4
    assert not torch.equal(weights(ddp), before)


def test_an_fp16_gradient_norm_is_that_of_the_unscaled_gradient() -> None:
    half, full = engine(SGD, precision="fp16"), engine(SGD)
    half.scale.value = 256.0
    norms = [train(each)[0].grad_norm.item() for each in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_loss_scale_is_restored(tmp_path: Path) -> None:
    ddp = engine(SGD, precision="fp16")
    ddp.scale.value = 512.0
    train(ddp, 2)
    other = restored(ddp, engine(SGD, precision="fp16"), tmp_path)
    assert other.scale.state() == ddp.scale.state() == {"value": 512.0, "good_steps": 2}


def test_evaluation_has_no_gradient_and_no_dropout() -> None:
    noisy = tiny_model(attention_dropout=0.5)
    ddp = engine(SGD, model=noisy)
    batch = pair_batch(4, packed=False)  # dropout in attention is for padded rows alone
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = ddp.evaluate(batch, COUNTS), ddp.evaluate(batch, COUNTS)
    assert not first.loss.requires_grad
    assert torch.equal(first.logps, second.logps)
    # else evaluating would change the training that follows
    assert torch.equal(torch.get_rng_state(), state)
    assert noisy.training
    assert all(p.grad is None for p in noisy.parameters())


@pytest.mark.parametrize("name", ELEMENTWISE_OPTIMIZERS)
def test_weights_and_optimizer_state_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    optimizer = {
        "name": f"torch.optim.{name}",
        "lr": 1e-2,
        "kwargs": {"momentum": 0.9} if name == "SGD" else {},
    }
    ddp = engine(optimizer, {"name": "linear"})
    train(ddp, 2)
    other = restored(ddp, engine(optimizer, {"name": "linear"}, seed=3), tmp_path)
    assert torch.equal(weights(other), weights(ddp))
    for mine, theirs in zip(ddp.saved.values(), other.saved.values(), strict=True):
        saved, actual = ddp.optimizer.state[mine], other.optimizer.state[theirs]
        assert saved.keys() == actual.keys()
        for key, value in saved.items():
            assert torch.equal(value, actual[key]), key
            assert (value.dtype, value.shape) == (actual[key].dtype, actual[key].shape), key
    train(ddp, 2, seed=50)
    train(other, 2, seed=50)
    assert torch.equal(weights(other), weights(ddp))
    assert json.dumps(ddp.state()) == json.dumps(other.state())  # as text, where a tuple is a list


@pytest.mark.parametrize("kwargs", [{"momentum": 0.9}, {}], ids=["momentum", "plain"])
def test_sgd_goes_on_with_or_without_momentum(kwargs: dict[str, Any], tmp_path: Path) -> None:
    optimizer = {"name": "torch.optim.SGD", "lr": 0.1, "kwargs": kwargs}
    ddp = engine(optimizer)
    train(ddp, 2)
    other = restored(ddp, engine(optimizer, seed=3), tmp_path)
    assert ("momentum_buffer" in next(iter(ddp.iter_shards())).tensors) is bool(kwargs)
    train(ddp, seed=50)
    train(other, seed=50)
    assert torch.equal(weights(other), weights(ddp))


def test_a_state_from_before_the_first_step_is_whole(tmp_path: Path) -> None:
    ddp = engine({"name": "torch.optim.AdamW"})
    other = restored(ddp, engine({"name": "torch.optim.AdamW"}, seed=3), tmp_path)
    assert torch.equal(weights(other), weights(ddp))
    train(ddp)
    train(other)
    assert torch.equal(weights(other), weights(ddp))


def test_every_parameter_is_owned_once_whole_under_its_name() -> None:
    policy = tiny_model(tie_word_embeddings=False)
    policy.model.embed_tokens.weight.requires_grad_(False)
    ddp = engine({"name": "torch.optim.AdamW"}, model=policy)
    train(ddp)
    owned = {part.name: part for part in ddp.iter_shards()}
    assert set(owned) == set(policy.state_dict())
    for name, tensor in policy.state_dict().items():
        part: Shard = owned[name]
        assert (part.shape, part.start, part.stop) == (tuple(tensor.shape), 0, tensor.numel())
        assert torch.equal(part.tensors["param"].view(part.shape), tensor)
        is_frozen = name == "model.embed_tokens.weight"
        assert set(part.tensors) == (
            {"param"} if is_frozen else {"param", "exp_avg", "exp_avg_sq", "scalar:step"}
        )


def test_a_frozen_parameter_is_restored_too(tmp_path: Path) -> None:
    def frozen(seed: int) -> DdpEngine:
        policy = tiny_model(seed, tie_word_embeddings=False)
        policy.model.embed_tokens.weight.requires_grad_(False)
        return engine({"name": "torch.optim.AdamW"}, model=policy)

    ddp = frozen(0)
    train(ddp)
    other = restored(ddp, frozen(3), tmp_path)
    assert torch.equal(weights(other), weights(ddp))
    assert not other.saved["model.embed_tokens.weight"].requires_grad


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "linear", "warmup_steps": 2},
        {"name": "cosine"},
        {"name": "constant", "warmup_steps": 6},
        {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 2, "gamma": 0.5}},
        {
            "name": "torch.optim.lr_scheduler.MultiStepLR",
            "kwargs": {"milestones": [2, 4, 4, 6], "gamma": 0.5},
        },
        {"name": "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", "kwargs": {"T_0": 3}},
        {
            "name": "torch.optim.lr_scheduler.OneCycleLR",
            "kwargs": {"max_lr": 0.1, "total_steps": 20},
        },
        {"name": "torch.optim.lr_scheduler.ExponentialLR", "kwargs": {"gamma": 0.9}},
    ],
    ids=lambda schedule: schedule["name"].rpartition(".")[2],
)
def test_a_schedule_goes_on_where_it_was(schedule: dict[str, Any], tmp_path: Path) -> None:
    optimizer = {"name": "torch.optim.AdamW", "lr": 1e-2}
    ddp, expected = engine(optimizer, schedule), engine(optimizer, schedule)
    rates = [updated.lr for updated in train(expected, 8)]
    assert len(set(rates)) > 2
    train(ddp, 3)
    other = restored(ddp, engine(optimizer, schedule, seed=3), tmp_path)
    assert [updated.lr for updated in train(other, 5)] == rates[3:]
