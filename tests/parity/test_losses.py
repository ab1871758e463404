"""Every loss of ours, in value and gradient: against an fp64 computation of its own and against live TRL.

`python tests/parity/test_losses.py` prints the table.
"""

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from parity.parity_support import need_trl, trl_trainer
from parity.test_training import exact_model
from support import TINY_MODEL, tiny_spec, write_jsonl
from support import rows as made_rows

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator, Row
from orchestrator.dpo.losses import LOSSES, PairTerms
from orchestrator.dpo.step import METRICS, PairStep
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.fused import fuse
from orchestrator.models.policy import load_tokenizer
from orchestrator.models.reference import Reference
from orchestrator.settings.spec import OF_SCORES, SMOOTHED, DpoSpec, FDivergence, LossType
from orchestrator.training.metrics import means

need_trl()

BETA, LR, STEPS, PAIRS, MAX_LENGTH = 0.3, 0.03, 3, 6, 40
EXACT = 1e-9  # relative, of our fp64 and the computation here
FP32 = 2e-6  # of our fp32; TRL's distance from the truth comes on top
TRL_IS_NEAR = 1e-4  # how far TRL may be from the truth; what is further is another loss
GRADIENT_FP32 = 2e-5
TRL_GRADIENT_IS_NEAR = 1e-3  # of ipo with forward_kl, whose parts cancel, 9e-5; of any other 1e-5
NOT_TRLS = ("cdpo", "simpo", "orpo")  # no losses of TRL's DPOTrainer


# --- what is compared --------------------------------------------------------------------------------------------


def dpo_spec(loss_type: LossType | list[LossType], **settings: Any) -> DpoSpec:
    return DpoSpec(loss_type=loss_type, **{"beta": BETA, **settings})


def plain(name: LossType) -> DpoSpec:
    return dpo_spec(name, label_smoothing=1e-3 if name == "exo_pair" else 0.0)


def diverging(name: LossType, divergence: FDivergence, **settings: Any) -> DpoSpec:
    return dpo_spec(name, label_smoothing=plain(name).label_smoothing, f_divergence_type=divergence, **settings)


TABLE: list[DpoSpec] = [
    *map(plain, get_args(LossType)),
    *(dpo_spec(name, label_smoothing=0.1) for name in SMOOTHED),
    *(diverging(name, "forward_kl") for name in OF_SCORES),
    *(diverging(name, "js_divergence") for name in OF_SCORES),
    *(diverging(name, "alpha_divergence") for name in OF_SCORES),
    *(diverging("sigmoid", "alpha_divergence", f_alpha_divergence_coef=alpha) for alpha in (-0.5, 1.0, 1.7)),
    dpo_spec("discopop", discopop_tau=1.5),
    dpo_spec("simpo", simpo_gamma=1.2),
    dpo_spec(["sigmoid", "sft"], loss_weights=[1, 0.5]),  # RPO
    dpo_spec(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1]),  # MPO
    dpo_spec(["hinge", "apo_zero"]),
    dpo_spec(["sigmoid", "exo_pair"], loss_weights=[0.5, 1], label_smoothing=0.1),  # which acts in the second alone
    dpo_spec(["robust", "sft"], label_smoothing=0.2, f_divergence_type="js_divergence"),
]


def named(dpo: DpoSpec) -> str:
    """The settings that differ from their defaults."""
    weights = [f"{weight:g} " if dpo.loss_weights else "" for weight in dpo.weights]
    words = [" + ".join(weight + name for weight, name in zip(weights, dpo.loss_types, strict=True))]
    for name in ("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma"):
        if (value := getattr(dpo, name)) != DpoSpec.model_fields[name].default:
            words.append(str(value) if name == "f_divergence_type" else f"{name}={value}")
    return ", ".join(words)


class Case(NamedTuple):
    """A policy and its reference, TRL's rows of token ids and trainer, and what an fp64 computation says of them."""

    folder: Path
    rows: list[Row]
    trainer: Any
    inputs: dict[str, Tensor]
    logps: Tensor  # [2B] fp64
    ref_logps: Tensor  # [2B] fp64
    jacobian: Tensor  # [2B, parameters] of logps, fp64

    @property
    def tokens(self) -> Tensor:
        """[2B] of the completions, the unscored first one of an empty prompt too."""
        return torch.tensor([len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in self.rows])


def make_case(folder: Path) -> Case:
    rows = [*made_rows(PAIRS - 1, seed=11), {"prompt": "", "chosen": "green river", "rejected": "blue"}]
    write_jsonl(folder / "train.jsonl", made_rows(64))
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    config = AutoConfig.for_model("qwen2", initializer_range=0.1, **{**TINY_MODEL, "vocab_size": len(tokenizer)})
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    policy, reference = (loaded(folder, name, torch.float32) for name in ("policy", "reference"))
    trainer = trl_trainer(
        folder / "trl", policy, tokenizer, rows, reference, loss_type=["sigmoid"], max_length=MAX_LENGTH
    )
    trl_rows = [{**row, "pair_id": number} for number, row in enumerate(trainer.train_dataset)]
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])

    exact_policy, exact_reference = (exact_model(folder / name) for name in ("policy", "reference"))
    logps, parameters = sequence_logps(exact_policy, trl_rows), [p for _, p in sorted(exact_policy.named_parameters())]
    jacobian = torch.stack(
        [flat(torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True)) for each in logps]
    )
    ref_logps = sequence_logps(exact_reference, trl_rows).detach()
    return Case(folder, trl_rows, trainer, inputs, logps.detach(), ref_logps, jacobian)


def loaded(folder: Path, name: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).train()


def flat(gradients: Any) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return flat([p.grad for _, p in sorted(model.named_parameters())])


def sequence_logps(model: Any, rows: list[Row]) -> Tensor:
    """[2B] one sequence at a time from full logits; a token at position 0 has none before it."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids, start = torch.tensor(row["prompt_ids"] + row[side]), max(1, len(row["prompt_ids"]))
            log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            found.append(log_probs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())
    return torch.stack(found)


# --- the losses once more, as their papers have them -------------------------------------------------------------


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def odds(mean_logp: Tensor) -> Tensor:
    return torch.exp(mean_logp) / (1 - torch.exp(mean_logp))


def derivative_of_f(t: Tensor, dpo: DpoSpec) -> Tensor:
    alpha = 1.0 if dpo.f_divergence_type == "reverse_kl" else dpo.f_alpha_divergence_coef
    if dpo.f_divergence_type == "forward_kl":
        return 1 - 1 / t
    if dpo.f_divergence_type == "js_divergence":
        return torch.log(2 * t / (t + 1))
    return torch.log(t) if alpha == 1 else (t ** (alpha - 1) - 1) / (alpha - 1)


def truth(case: Case, dpo: DpoSpec, logps: Tensor) -> Tensor:
    """The loss of the case's pairs at these log-probs [2B]."""
    b, e, gamma, tau = dpo.beta, dpo.label_smoothing, dpo.simpo_gamma, dpo.discopop_tau
    (w, x), (ref_w, ref_x), (n_w, n_x) = (each.chunk(2) for each in (logps, case.ref_logps, case.tokens.double()))
    r_w, r_x = w - ref_w, x - ref_x
    s_w, s_x = derivative_of_f(torch.exp(r_w), dpo), derivative_of_f(torch.exp(r_x), dpo)
    m, g = b * (s_w - s_x), sig(b * (s_w - s_x) / tau)
    simpo = b / n_w * w - b / n_x * x - gamma
    log_odds_ratio = torch.log(odds(w / n_w) / odds(x / n_x))
    scored = sum(len(row["chosen_ids"]) - (not row["prompt_ids"]) for row in case.rows)
    values: dict[LossType, Callable[[], Tensor]] = {
        "sigmoid": lambda: -torch.log(sig(m)),
        "hinge": lambda: torch.where(m < 1, 1 - m, 0.0),
        "ipo": lambda: (s_w / n_w - s_x / n_x - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: sig(m) * torch.log(sig(m) / (1 - e)) + sig(-m) * torch.log(sig(-m) / e),
        "nca_pair": lambda: -torch.log(sig(b * r_w)) - torch.log(sig(-b * r_w)) / 2 - torch.log(sig(-b * r_x)) / 2,
        "robust": lambda: (-(1 - e) * torch.log(sig(m)) + e * torch.log(sig(-m))) / (1 - 2 * e),
        "bco_pair": lambda: -torch.log(sig(b * r_w)) - torch.log(1 - sig(b * r_x)),
        "sppo_hard": lambda: (r_w - 1 / (2 * b)) ** 2 + (r_x + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - sig(b * r_w) + sig(b * r_x),
        "apo_down": lambda: sig(b * r_w) + 1 - sig(b * (r_w - r_x)),
        "discopop": lambda: -(1 - g) * torch.log(sig(m)) + g * torch.exp(-m),
        "sft": lambda: -w.sum() / scored,
        "sigmoid_norm": lambda: -torch.log(sig(b * (s_w / n_w - s_x / n_x))),
        "cdpo": lambda: -(1 - e) * torch.log(sig(m)) - e * torch.log(sig(-m)),
        "simpo": lambda: -(1 - e) * torch.log(sig(simpo)) - e * torch.log(sig(-simpo)),
        "orpo": lambda: -w / n_w - b * torch.log(sig(log_odds_ratio)),
    }
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in zip(dpo.loss_types, dpo.weights, strict=True):
        total = total + weight * values[name]().mean()
    return total


# --- the three sides ---------------------------------------------------------------------------------------------

Found = tuple[float, Tensor]
"""The loss, and its gradient of all parameters."""


def exactly(case: Case, dpo: DpoSpec) -> Found:
    leaf = case.logps.clone().requires_grad_()
    loss = truth(case, dpo, leaf)
    [slope] = torch.autograd.grad(loss, leaf)
    return loss.item(), slope @ case.jacobian


def trls(case: Case, dpo: DpoSpec) -> Found:
    """What TRL's trainer says once these are its settings."""
    trainer = case.trainer
    trainer.loss_types, trainer.loss_weights = dpo.loss_types, dpo.weights
    trainer.beta, trainer.label_smoothing = dpo.beta, dpo.label_smoothing
    trainer.f_divergence_type, trainer.f_alpha_divergence_coef = dpo.f_divergence_type, dpo.f_alpha_divergence_coef
    trainer.args.discopop_tau = dpo.discopop_tau
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, case.inputs)
    loss.backward()
    return loss.item(), flat_gradient(trainer.model)


class Ours:
    """Our step over the case's pairs."""

    def __init__(self, case: Case, dtype: torch.dtype, packed: bool = True, policy: str = "policy") -> None:
        self.policy, reference = loaded(case.folder, policy, dtype), loaded(case.folder, "reference", dtype)
        for model in (self.policy, reference):
            fuse(model)
            if packed:
                use_packed_attention(model, "cpu")
        self.step = PairStep(self.policy, Reference(reference), plain("sigmoid"))
        data = tiny_spec(case.folder).data.model_copy(update={"max_length": MAX_LENGTH})
        self.batch: PairBatch = (PackedCollator(data) if packed else PreferenceCollator(0, data))(case.rows)

    def __call__(self, dpo: DpoSpec) -> Found:
        self.step.dpo = dpo
        self.policy.zero_grad()
        output: Any = self.step(self.batch, self.batch.counts)
        output.loss.backward()
        self.metrics = means(output.metric_sums.tolist())
        return output.loss.item(), flat_gradient(self.policy)


class Distances(NamedTuple):
    """How far two are from each other: values by max(1, |truth|), gradients by the truth's norm."""

    ours64: tuple[float, float]  # from the truth
    trl: tuple[float, float]  # from the truth; NaN where TRL has no such loss
    ours32: tuple[float, float]  # from TRL, or there from the truth


def apart(left: Found, right: Found, true: Found) -> tuple[float, float]:
    value = abs(left[0] - right[0]) / max(1.0, abs(true[0]))
    return value, float((left[1].double() - right[1].double()).norm() / true[1].norm())


def distances(case: Case, exact: Ours, single: Ours, dpo: DpoSpec) -> Distances:
    true = exactly(case, dpo)
    nowhere = math.nan, math.nan
    if not set(NOT_TRLS).isdisjoint(dpo.loss_types):
        return Distances(apart(exact(dpo), true, true), nowhere, apart(single(dpo), true, true))
    theirs = trls(case, dpo)
    return Distances(apart(exact(dpo), true, true), apart(theirs, true, true), apart(single(dpo), theirs, true))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def exact(case: Case) -> Ours:
    return Ours(case, torch.float64)


@pytest.fixture(scope="module")
def single(case: Case) -> Ours:
    return Ours(case, torch.float32)


# --- the tests ---------------------------------------------------------------------------------------------------


def test_the_rows_hold_what_matters(case: Case) -> None:
    assert {name for dpo in TABLE for name in dpo.loss_types} == set(LOSSES)
    assert any(not row["prompt_ids"] for row in case.rows)  # its first tokens are counted and not scored
    assert len({len(row["chosen_ids"]) for row in case.rows}) > 2
    chosen, rejected = (case.logps - case.ref_logps).chunk(2)
    assert {bool(margin > 0) for margin in chosen - rejected} == {True, False}
    assert 1 < float((chosen - rejected).abs().max()) < 30


def test_the_table_is_of_settings_that_are_allowed(case: Case) -> None:
    for dpo in TABLE:
        assert tiny_spec(case.folder, dpo=dpo.model_dump(exclude_defaults=True)).dpo == dpo


@pytest.mark.parametrize("dpo", TABLE, ids=named)
def test_value_and_gradient(case: Case, exact: Ours, single: Ours, dpo: DpoSpec) -> None:
    found = distances(case, exact, single, dpo)
    assert max(found.ours64) < EXACT
    assert exact.metrics["loss"] == pytest.approx(exactly(case, dpo)[0], rel=EXACT)
    if not set(NOT_TRLS).isdisjoint(dpo.loss_types):
        assert found.ours32[0] < FP32
        assert found.ours32[1] < GRADIENT_FP32
        return
    assert found.trl[0] < TRL_IS_NEAR
    assert found.trl[1] < TRL_GRADIENT_IS_NEAR
    # no farther from TRL than TRL is from the truth
    assert found.ours32[0] <= FP32 + found.trl[0]
    assert found.ours32[1] <= GRADIENT_FP32 + found.trl[1]


def test_rewards_are_the_same_whatever_the_loss(exact: Ours) -> None:
    seen = []
    for name in get_args(LossType):
        exact(plain(name))
        seen.append({key: value for key, value in exact.metrics.items() if key != "loss"})
    assert all(metrics == seen[0] for metrics in seen)


@pytest.mark.parametrize("name", [name for name in get_args(LossType) if name not in (*OF_SCORES, *NOT_TRLS)])
def test_trl_refuses_an_f_divergence_where_our_settings_do(case: Case, name: LossType) -> None:
    with pytest.raises(ValueError, match="is only supported for the following loss types"):
        trl_trainer(
            case.folder / "refused",
            case.trainer.model,
            case.trainer.processing_class,
            made_rows(2),
            case.trainer.ref_model,
            loss_type=name,
            f_divergence_type="js_divergence",
        )


def test_trl_takes_an_f_divergence_where_our_settings_do(case: Case) -> None:
    trl_trainer(
        case.folder / "taken",
        case.trainer.model,
        case.trainer.processing_class,
        made_rows(2),
        case.trainer.ref_model,
        loss_type=[name for name in OF_SCORES if name not in NOT_TRLS],
        f_divergence_type="js_divergence",
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo_trainer(case: Case, smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    dpo = dpo_spec("simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=smoothing)
    settings = {"beta": 2.0, "simpo_gamma": 1.2, "label_smoothing": smoothing, "loss_type": "simpo", "alpha": 0.0}
    trainer: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = CPOTrainer.cpo_loss(trainer, *(case.logps / case.tokens).chunk(2))  # pyright: ignore
    found = LOSSES["simpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), dpo)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_the_odds_ratio_of_orpo_is_that_of_trls_orpo_trainer(case: Case) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer: Any = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (case.logps / case.tokens).chunk(2)
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # pyright: ignore
    found = LOSSES["orpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), plain("orpo"))
    assert torch.allclose(found + chosen, -expected.double(), rtol=1e-5)


# --- three steps -------------------------------------------------------------------------------------------------

TRAINED = [
    dpo_spec("ipo", beta=0.1),
    dpo_spec(["sigmoid", "bco_pair", "sft"], beta=0.1, loss_weights=[0.8, 0.2, 1]),
]
Trace = list[dict[str, float]]
NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


def trl_trace(case: Case, dpo: DpoSpec) -> Trace:
    trainer = trl_trainer(
        case.folder / "trained",
        loaded(case.folder, "reference", torch.float32),
        case.trainer.processing_class,
        [*made_rows(PAIRS - 1, seed=11), {"prompt": "", "chosen": "green river", "rejected": "blue"}],
        loaded(case.folder, "reference", torch.float32),
        loss_type=dpo.loss_types,
        loss_weights=dpo.loss_weights,
        beta=dpo.beta,
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        max_length=MAX_LENGTH,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def our_trace(case: Case, dpo: DpoSpec, dtype: torch.dtype, packed: bool) -> Trace:
    """The same steps by plain SGD, from the reference."""
    ours, trace = Ours(case, dtype, packed, policy="reference"), []
    for _ in range(STEPS):
        ours(dpo)
        trace.append(ours.metrics)
        with torch.no_grad():
            for p in ours.policy.parameters():
                p -= LR * torch.zeros_like(p) if p.grad is None else LR * p.grad
    return trace


@pytest.mark.parametrize("dpo", TRAINED, ids=named)
def test_three_steps_are_trls(case: Case, dpo: DpoSpec) -> None:
    trl, exact = trl_trace(case, dpo), our_trace(case, dpo, torch.float64, packed=True)
    assert trl[-1]["loss"] < 0.95 * trl[0]["loss"]
    assert set(NAMES) <= set(METRICS)
    for packed in (True, False):
        found = our_trace(case, dpo, torch.float32, packed)
        for step in range(STEPS):
            for name in NAMES:
                ours, theirs, true = found[step][name], trl[step][name], exact[step][name]
                # no farther from TRL than TRL is from the truth
                assert abs(ours - theirs) <= FP32 * max(1.0, abs(true)) + abs(theirs - true), (step, name, packed)
                assert abs(theirs - true) <= TRL_IS_NEAR * max(1.0, abs(true)), (step, name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = make_case(Path(folder))
        sides = Ours(made, torch.float64), Ours(made, torch.float32)
        print("| loss | our fp64 from the truth | TRL from the truth | our fp32 from TRL |\n|---|---|---|---|")
        for dpo in TABLE:
            cells = (f"{value:.0e}, {gradient:.0e}" for value, gradient in distances(made, *sides, dpo))
            print("|", " | ".join([named(dpo), *cells]).replace("nan, nan", "no such loss"), "|")
