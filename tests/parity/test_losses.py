"""Every loss of ours, in value, gradient and metrics: against an fp64 computation of its own and
against live TRL.

Both trainers take one step of each row of the table, all pairs in one micro-batch, and numbers are
those of state.log_history. `python tests/parity/test_losses.py` prints the table.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.data.collate import Row
from orchestrator.dpo.losses import BATCH_LOSSES, LOSSES, PairTerms
from orchestrator.dpo.step import METRICS
from orchestrator.models.policy import load_tokenizer
from orchestrator.settings.loss import OF_BATCH, OF_SCORES, SMOOTHED, WITH_MARGIN, DpoSpec, LossType
from orchestrator.settings.model import AttentionName
from orchestrator.settings.precision import Precision
from orchestrator.training.assemble import assembled
from orchestrator.training.context import RunContext
from orchestrator.training.health import LocalSession
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import Trainer
from parity.test_training import exact_model, kept_signals
from support.tiny_parts import ALONE
from support.tiny_settings import TINY_MODEL, random_rows, tiny_spec, write_jsonl
from support.trl_trainer import need_trl, trl_tokens, trl_trainer

need_trl()

BETA, LR, STEPS, PAIRS, MAX_LENGTH = 0.3, 0.03, 3, 6, 40
NO_RATE, NO_CLIPPING = 1e-30, 1e9
WEIGHTS = (
    0.5,
    1.0,
    0.5,
    1.5,
    1.0,
    0.5,
)  # of pairs; in TRL, each of them stands there twice as often
MARGINS = (0.4, -0.2, 0.0, 0.9, 0.1, 0.6)
EXACT = 1e-9  # relative, of our fp64 and the computation here
EXACT_EXPERTS = 1e-6  # transformers' router is in fp32 whatever the model
# Of our fp32; TRL's distance from the truth comes on top. On CPUs with AVX2 alpha_divergence with a
# coefficient of 1.7, whose power makes more of a rounding, 2.1e-6; any other loss on any CPU 9e-7.
FP32 = 4e-6
TRL_IS_NEAR = 1e-4  # how far TRL may be from the truth; what is further is another loss
GRADIENT_FP32 = 5e-5  # of discopop with margins 3e-5: its tau makes 20 times as much of a rounding
TRL_GRADIENT_IS_NEAR = 1e-3  # of ipo with forward_kl, whose parts cancel, 9e-5; of any other 1e-5
LOGGED = (
    *METRICS,
    "grad_norm",
    "epoch",
)  # by both, of every step; and learning_rate, which is NO_RATE in the table
NOT_TRLS = ("cdpo", "simpo", "orpo")  # no losses of TRL's DPOTrainer
NOT_WEIGHTED_BY_TRL = (
    "hinge",
    "sft",
)  # it raises: an in-place product would change what the backward pass needs
# there of a micro-batch, here of the global batch: the same where that is all
SPLIT_IN_TRL = ("sft", *OF_BATCH)
TWINS: dict[str, LossType] = {  # a user's own losses, and those of TRL that they are
    "support.user_losses:logistic": "sigmoid",
    "support.user_losses:squared": "ipo",
    "support.user_losses:absolute": "bco_pair",
}
LOGISTIC, SQUARED, ABSOLUTE = TWINS


# --- what is compared -----------------------------------------------------------------------------


def dpo_spec(loss_type: str | list[str], **settings: Any) -> DpoSpec:
    return DpoSpec(loss_type=loss_type, **{"beta": BETA, **settings})


def plain(name: LossType) -> DpoSpec:
    return dpo_spec(name, label_smoothing=1e-3 if name == "exo_pair" else 0.0)


def with_option(name: LossType, **option: Any) -> DpoSpec:
    return dpo_spec(name, label_smoothing=plain(name).label_smoothing, **option)


Kind = Literal["plain", "margin", "weight", "experts"]
"""Pairs alone; with the margins or with the weights above, whose columns have these names; a
mixture of experts.
"""
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1]}
TABLE: dict[Kind, list[DpoSpec]] = {
    "plain": [
        *map(plain, get_args(LossType)),
        *(dpo_spec(name, label_smoothing=0.1) for name in SMOOTHED),
        *(
            with_option(name, ld_alpha=0.4) for name in get_args(LossType) if name != "sft"
        ),  # where it does not act
        *(
            with_option(name, use_weighting=True)
            for name in get_args(LossType)
            if name not in OF_BATCH
        ),  # refused
        *(with_option(name, f_divergence_type="forward_kl") for name in OF_SCORES),
        *(with_option(name, f_divergence_type="js_divergence") for name in OF_SCORES),
        *(with_option(name, f_divergence_type="alpha_divergence") for name in OF_SCORES),
        *(
            dpo_spec("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=a)
            for a in (-0.5, 1.0, 1.7)
        ),
        *(dpo_spec("sigmoid", ld_alpha=alpha) for alpha in (0.0, 1.0)),
        dpo_spec("discopop", discopop_tau=1.5),
        dpo_spec("simpo", simpo_gamma=1.2),
        dpo_spec(["sigmoid", "sft"], loss_weights=[1, 0.5]),  # RPO
        dpo_spec(**MPO),
        dpo_spec(**MPO, ld_alpha=0.4),  # not in its last
        dpo_spec(["aot", "hinge", "aot_unpaired"], loss_weights=[0.5, 0.2, 1], label_smoothing=0.1),
        dpo_spec(["hinge", "apo_zero"]),
        dpo_spec(["ipo", "apo_zero"], loss_weights=[1, 0.5], use_weighting=True, ld_alpha=0.4),
        dpo_spec(
            ["sigmoid", "exo_pair"], loss_weights=[0.5, 1], label_smoothing=0.1
        ),  # which acts in the second alone
        dpo_spec(["robust", "sft"], label_smoothing=0.2, f_divergence_type="js_divergence"),
        *(dpo_spec(own) for own in TWINS),
        dpo_spec(LOGISTIC, use_weighting=True),
        dpo_spec(SQUARED, ld_alpha=0.4),
        dpo_spec([LOGISTIC, ABSOLUTE, "sft"], loss_weights=[0.8, 0.2, 1]),
    ],
    "margin": [
        *map(plain, WITH_MARGIN),
        *(dpo_spec(name, label_smoothing=0.1) for name in SMOOTHED if name in WITH_MARGIN),
        *(
            with_option(name, f_divergence_type="js_divergence")
            for name in WITH_MARGIN
            if name in OF_SCORES
        ),
        dpo_spec("discopop", discopop_tau=1.5),
        dpo_spec("sigmoid", ld_alpha=0.4, use_weighting=True),
        dpo_spec(**MPO),  # in its first alone
    ],
    "weight": [
        *map(plain, get_args(LossType)),
        dpo_spec("sigmoid", use_weighting=True),
        dpo_spec(**MPO, ld_alpha=0.4),
        dpo_spec(["aot", "hinge", "aot_unpaired"], loss_weights=[0.5, 0.2, 1], label_smoothing=0.1),
        dpo_spec(SQUARED),
    ],
    "experts": [dpo_spec(["sigmoid", "sft"], router_aux_loss_coef=0)],
}
ROWS: list[tuple[Kind, DpoSpec]] = [(kind, dpo) for kind, dpos in TABLE.items() for dpo in dpos]


def named(kind: Kind, dpo: DpoSpec) -> str:
    """The settings that differ from their defaults, and what stands beside them."""
    weights = [f"{weight:g} " if dpo.loss_weights else "" for weight in dpo.weights]
    words = [
        " + ".join(weight + name for weight, name in zip(weights, dpo.loss_types, strict=True))
    ]
    for name, field in DpoSpec.model_fields.items():
        value = getattr(dpo, name)
        if value != field.default and name not in ("loss_type", "loss_weights", "beta"):
            words.append(str(value) if name == "f_divergence_type" else f"{name}={value}")
    beside = {
        "plain": [],
        "margin": ["data.margin_column"],
        "weight": ["data.weight_column"],
        "experts": ["experts"],
    }
    return ", ".join(words + beside[kind])


def is_trls(kind: Kind, dpo: DpoSpec) -> bool:
    """Return whether TRL can compute the loss."""
    beyond = {*NOT_TRLS, *(NOT_WEIGHTED_BY_TRL if dpo.use_weighting else ())}
    return kind != "margin" and beyond.isdisjoint(dpo.loss_types)


def in_trl(dpo: DpoSpec) -> list[str]:
    """The losses by the names that TRL has for them."""
    return [TWINS.get(name, name) for name in dpo.loss_types]


def remark(kind: Kind, dpo: DpoSpec) -> str:
    """Return the table's remark about TRL besides numbers."""
    if kind == "margin":
        return "TRL has no margins"
    if dpo.use_weighting and not set(NOT_WEIGHTED_BY_TRL).isdisjoint(dpo.loss_types):
        return "TRL raises"
    if not is_trls(kind, dpo):
        return "no loss of TRL's DPOTrainer"
    values = [f"a user's own, in TRL {TWINS[name]}" for name in dpo.own_losses]
    if kind == "weight":
        values.append("in TRL each pair as often as its weight says")
    if not set(SPLIT_IN_TRL).isdisjoint(dpo.loss_types):
        values.append("depends on the split in TRL, here one micro-batch")
    return "; ".join(values)


class Seen(NamedTuple):
    """Outputs of a model in fp64 for the case's sequences, all chosen first."""

    # [2B, 2] log-probs of as many tokens as both completions of the pair have, and of the rest
    parts: Tensor
    aligned: Tensor  # [2B] mean of log p - log(sum of p^2), of WPO
    # [2B, 4] over scored tokens: of ones, of the entropy, of the mean logit, of being the likeliest
    sums: Tensor

    def of(self, sequences: Tensor) -> "Seen":
        """The same of some sequences."""
        return Seen(*(each[sequences] for each in self))


class Case(NamedTuple):
    """A policy and its reference in folders of these names, pairs, and what an fp64 computation
    says of them.
    """

    folder: Path
    texts: list[dict[str, Any]]
    rows: list[Row]  # TRL's token ids
    margins: Tensor  # [B]
    policy: Seen
    reference: Seen
    jacobian: Tensor  # [2B, 2, parameters] of the policy's parts

    @property
    def tokens(self) -> Tensor:
        """[2B] of the completions, the unscored first one of an empty prompt too."""
        return torch.tensor([len(row[side]) for side in SIDES for row in self.rows])

    @property
    def logps(self) -> Tensor:
        """[2B] of the policy."""
        return self.policy.parts.sum(1)

    @property
    def ref_logps(self) -> Tensor:
        """[2B] of the reference."""
        return self.reference.parts.sum(1)

    def repeated(self) -> "Case":
        """With each pair twice as often as its weight says."""
        pairs = [pair for pair, weight in enumerate(WEIGHTS) for _ in range(int(2 * weight))]
        both = torch.tensor(pairs + [PAIRS + pair for pair in pairs])
        return self._replace(
            texts=[self.texts[pair] for pair in pairs],
            rows=[self.rows[pair] for pair in pairs],
            margins=self.margins[pairs],
            policy=self.policy.of(both),
            reference=self.reference.of(both),
            jacobian=self.jacobian[both],
        )

    def loaded(self, name: str) -> Any:
        """A model, in fp32 and training."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).train()


SIDES = ("chosen_ids", "rejected_ids")


def make_case(folder: Path, model_type: str = "qwen2", **config: Any) -> Case:
    texts = [
        *random_rows(PAIRS - 1, seed=11),
        {"prompt": "", "chosen": "green river", "rejected": "blue"},
    ]
    columns = zip(texts, WEIGHTS, MARGINS, strict=True)
    write_jsonl(
        folder / "pairs.jsonl", [{**text, "weight": w, "margin": m} for text, w, m in columns]
    )
    write_jsonl(folder / "train.jsonl", random_rows(64))  # of the tokenizer
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    shape = {**TINY_MODEL, **config, "vocab_size": len(tokenizer)}
    config_made = AutoConfig.for_model(model_type, initializer_range=0.1, **shape)
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config_made, dtype=torch.float32)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenized = trl_tokens(Dataset.from_list(texts), tokenizer, MAX_LENGTH)
    # as TRL's collator cuts them; keep_start
    rows = [
        {
            "prompt_ids": row["prompt_ids"],
            **{side: row[side][: MAX_LENGTH - len(row["prompt_ids"])] for side in SIDES},
        }
        for row in tokenized
    ]

    exact_policy, exact_reference = (exact_model(folder / name) for name in ("policy", "reference"))
    seen = looked_at(exact_policy, rows)
    parameters = [p for _, p in sorted(exact_policy.named_parameters())]
    gradient = partial(
        torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    jacobian = torch.stack(
        [flat(gradient(part, parameters)) for part in seen.parts.flatten()]
    ).unflatten(0, (-1, 2))
    with torch.no_grad():
        reference = looked_at(exact_reference, rows)
    policy = seen._replace(parts=seen.parts.detach())
    return Case(folder, texts, rows, torch.zeros(PAIRS).double(), policy, reference, jacobian)


def flat(gradients: Any) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def flat_gradient(model: torch.nn.Module) -> Tensor:
    named_parameters = sorted(model.named_parameters())
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for _, p in named_parameters])


def looked_at(model: Any, rows: list[Row]) -> Seen:
    """One sequence at a time from full logits; a token at position 0 has none before it."""
    parts, aligned, sums = [], [], []
    for side in SIDES:
        for row in rows:
            first = not row["prompt_ids"]
            ids, start = torch.tensor(row["prompt_ids"] + row[side]), len(row["prompt_ids"]) + first
            logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
            log_probs, labels = logits.log_softmax(-1), ids[start:]
            logps = log_probs[torch.arange(len(labels)), labels]
            shorter = min(len(row[each]) for each in SIDES) - first
            parts.append(torch.stack([logps[:shorter].sum(), logps[shorter:].sum()]))
            aligned.append((logps - log_probs.exp().square().sum(-1).log()).mean().detach())
            entropy, top1 = (
                -(log_probs.exp() * log_probs).sum(),
                (logits.argmax(-1) == labels).sum(),
            )
            sums.append(
                torch.stack(
                    [torch.tensor(len(labels)), entropy, logits.mean(-1).sum(), top1]
                ).detach()
            )
    return Seen(torch.stack(parts), torch.stack(aligned), torch.stack(sums))


# --- the losses once more, as their papers have them ----------------------------------------------


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


def log_ratios(case: Case, dpo: DpoSpec, parts: Tensor) -> tuple[Tensor, Tensor]:
    """[2B] log-probs of the policy, and log-ratios to the reference: LD-DPO's, where it is asked
    for.
    """
    weights = torch.tensor(
        [1.0, 1.0 if dpo.ld_alpha is None else dpo.ld_alpha], dtype=torch.float64
    )
    return parts @ weights, (parts - case.reference.parts) @ weights


def truth(case: Case, dpo: DpoSpec, parts: Tensor) -> Tensor:
    """The loss of the case's pairs at these log-probs [2B, 2]."""
    b, e, gamma, tau = dpo.beta, dpo.label_smoothing, dpo.simpo_gamma, dpo.discopop_tau
    logps, ratios = log_ratios(case, dpo, parts)
    (w, x), (r_w, r_x), (n_w, n_x) = (
        each.chunk(2) for each in (logps, ratios, case.tokens.double())
    )
    s_w, s_x = derivative_of_f(torch.exp(r_w), dpo), derivative_of_f(torch.exp(r_x), dpo)
    m = b * s_w - b * s_x - case.margins
    g = sig(m / tau)
    simpo = b / n_w * w - b / n_x * x - gamma - case.margins
    log_odds_ratio = torch.log(odds(w / n_w) / odds(x / n_x))
    scored = case.policy.sums[: len(case.rows), 0].sum()

    def smoothed(margin: Tensor) -> Tensor:
        return -(1 - e) * torch.log(sig(margin)) - e * torch.log(sig(-margin))

    values: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -torch.log(sig(m)),
        "hinge": lambda: torch.where(m < 1, 1 - m, 0.0),
        "ipo": lambda: (s_w / n_w - s_x / n_x - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: sig(m) * torch.log(sig(m) / (1 - e)) + sig(-m) * torch.log(sig(-m) / e),
        "nca_pair": lambda: (
            -torch.log(sig(b * r_w)) - torch.log(sig(-b * r_w)) / 2 - torch.log(sig(-b * r_x)) / 2
        ),
        "robust": lambda: (-(1 - e) * torch.log(sig(m)) + e * torch.log(sig(-m))) / (1 - 2 * e),
        "bco_pair": lambda: -torch.log(sig(b * r_w)) - torch.log(1 - sig(b * r_x)),
        "sppo_hard": lambda: (r_w - 1 / (2 * b)) ** 2 + (r_x + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed(b * ((w - x).sort().values - (w - x - r_w + r_x).sort().values)),
        "aot_unpaired": lambda: smoothed(b * (r_w.sort().values - r_x.sort().values)),
        "apo_zero": lambda: 1 - sig(b * r_w) + sig(b * r_x),
        "apo_down": lambda: sig(b * r_w) + 1 - sig(b * (r_w - r_x)),
        "discopop": lambda: -(1 - g) * torch.log(sig(m)) + g * torch.exp(-m),
        "sft": lambda: -parts[: len(case.rows)].sum(1) / scored * len(case.rows),
        "sigmoid_norm": lambda: -torch.log(sig(b * (s_w / n_w - s_x / n_x) - case.margins)),
        "cdpo": lambda: smoothed(m),
        "simpo": lambda: smoothed(simpo),
        "orpo": lambda: -w / n_w - b * torch.log(sig(log_odds_ratio)),
    }
    weighted = [
        weight * values[name]() for name, weight in zip(in_trl(dpo), dpo.weights, strict=True)
    ]
    by_pair, aligned = torch.stack(weighted).sum(0), case.policy.aligned.view(2, -1).sum(0)
    on_policy = torch.exp(aligned)  # of the tokens, not LD-DPO's
    return (on_policy * by_pair if dpo.use_weighting else by_pair).mean()


def true_metrics(case: Case, dpo: DpoSpec) -> dict[str, float]:
    """Return the metrics that are logged besides the loss and its gradient."""
    logps, ratios = log_ratios(case, dpo, case.policy.parts)
    (w, x), (r_w, r_x) = logps.chunk(2), (dpo.beta * ratios).chunk(2)
    ones, entropy, logits, top1 = (
        case.policy.sums.t().unflatten(1, (2, -1)).sum(2)
    )  # of chosen and of rejected
    fed = [len(row["prompt_ids"]) + len(row[side]) for side in SIDES for row in case.rows]
    values = {
        "rewards/chosen": r_w.mean(),
        "rewards/rejected": r_x.mean(),
        "rewards/accuracies": (r_w > r_x).double().mean(),
        "rewards/margins": (r_w - r_x).mean(),
        "logps/chosen": w.mean(),
        "logps/rejected": x.mean(),
        "logits/chosen": logits[0] / ones[0],
        "logits/rejected": logits[1] / ones[1],
        "entropy": entropy.sum() / ones.sum(),
        "mean_token_accuracy": top1[0] / ones[0],
        "num_tokens": sum(fed),
        "epoch": 1,
    }
    return {name: float(value) for name, value in values.items()}


# --- the three sides ------------------------------------------------------------------------------


class Found(NamedTuple):
    """Results of one side for the case."""

    metrics: dict[str, float]  # with the loss
    gradient: Tensor  # of all parameters


def exactly(case: Case, dpo: DpoSpec) -> Found:
    leaf = case.policy.parts.clone().requires_grad_()
    loss = truth(case, dpo, leaf)
    [slope] = torch.autograd.grad(loss, leaf)
    gradient = torch.einsum("sp,spn->n", slope, case.jacobian)
    norm = gradient.norm().item()
    return Found({"loss": loss.item(), "grad_norm": norm, **true_metrics(case, dpo)}, gradient)


class OneRowAStep(TrainerCallback):
    """Has a trainer, TRL's or ours, take each step with the settings of another row of the table,
    and keeps the gradient that it makes. restart: after as many steps the weights are again what
    they were.
    """

    def __init__(
        self, table: list[DpoSpec], take: Callable[[DpoSpec], None], restart: int = 0
    ) -> None:
        self.table, self.take, self.restart = table, take, restart
        self.gradients: list[Tensor] = []
        self.start: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.start = {
            name: weight.clone() for name, weight in options["model"].state_dict().items()
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self.restart and state.global_step % self.restart == 0:
            options["model"].load_state_dict(self.start)
        self.take(self.table[state.global_step])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.gradients.append(flat_gradient(options["model"]))

    def results(self, log_history: list[dict[str, float]]) -> list[Found]:
        """Return the results of each step; counts since the start of training become counts of a
        step.
        """
        lines = [line for line in log_history if "loss" in line]
        values: list[Found] = []
        for line, gradient in zip(lines, self.gradients, strict=True):
            assert line.keys() == {*LOGGED, "learning_rate", "step"}
            counted = {name: line[name] / line["step"] for name in ("num_tokens", "epoch")}
            values.append(Found({**line, **counted}, gradient))
        assert len(values) == len(self.table)
        return values


def their_trainer(case: Case, policy: str = "policy", **settings: Any) -> Any:
    return trl_trainer(
        case.folder / "trl",
        case.loaded(policy),
        AutoTokenizer.from_pretrained(case.folder / "policy"),
        case.texts,
        case.loaded("reference"),
        **{"loss_type": ["sigmoid"], "beta": BETA, "max_length": MAX_LENGTH, **settings},
    )


def set_in_theirs(trainer: Any, dpo: DpoSpec) -> None:
    trainer.loss_types, trainer.loss_weights = in_trl(dpo), dpo.weights
    for name in (
        "beta",
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
    ):
        setattr(trainer, name, getattr(dpo, name))
    trainer.use_weighting, trainer.args.discopop_tau = dpo.use_weighting, dpo.discopop_tau


def their_steps(
    case: Case,
    table: list[DpoSpec],
    policy: str = "policy",
    rate: float = NO_RATE,
    restart: int = 0,
) -> list[Found]:
    trainer = their_trainer(
        case,
        policy,
        per_device_train_batch_size=len(case.texts),
        max_steps=len(table),
        learning_rate=rate,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=NO_CLIPPING,
        use_weighting=True,  # so that its head makes what the rows with it need
        router_aux_loss_coef=table[0].router_aux_loss_coef,
    )
    steps = OneRowAStep(table, partial(set_in_theirs, trainer), restart)
    trainer.add_callback(steps)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return steps.results(trainer.state.log_history)


def set_in_ours(trainer: Trainer, dpo: DpoSpec) -> None:
    spec = trainer.context.spec.model_copy(update={"dpo": dpo})
    trainer.context = replace(trainer.context, spec=spec)
    step = trainer.engine.step
    step.dpo, step.reference.ld_alpha = dpo, dpo.ld_alpha


def our_steps(
    case: Case,
    table: list[DpoSpec],
    precision: Precision,
    kind: Kind = "plain",
    policy: str = "policy",
    rate: float = NO_RATE,
    restart: int = 0,
    attention: AttentionName = "auto",
) -> list[Found]:
    columns = {f"{kind}_column": kind} if kind in ("margin", "weight") else {}
    spec = tiny_spec(
        case.folder,
        run={"dir": tempfile.mkdtemp(dir=case.folder), "name": kind},
        model={"init": None, "path": str(case.folder / policy), "attention": attention},
        data={
            "train": str(case.folder / "pairs.jsonl"),
            "eval": None,
            "max_length": MAX_LENGTH,
            **columns,
        },
        dpo=table[0].model_dump(exclude_defaults=True),
        reference={"path": str(case.folder / "reference"), "cache": "off"},
        batch={"global_batch_size": PAIRS, "micro_batch_size": PAIRS},
        optimizer={"name": "torch.optim.SGD", "lr": rate},
        scheduler={"name": "constant"},
        training={
            "max_steps": len(table),
            "logging_steps": 1,
            "max_grad_norm": NO_CLIPPING,
            "pair_ledger": False,
        },
        precision=precision,
    )
    run_dir = RunDir(spec.run_dir)
    run_dir.begin(spec)
    trainer: Any = None
    steps = OneRowAStep(table, lambda dpo: set_in_ours(trainer, dpo), restart)
    with kept_signals():
        parts = assembled(
            RunContext(spec, ALONE, LocalSession(run_dir, 0), run_dir),
            prepare(spec),
            callbacks=[steps],
        )
        with parts as trainer:
            trainer.fit()
            return steps.results(trainer.callbacks.state.log_history)


class Distances(NamedTuple):
    """Distances between two results: values relative to max(1, |truth|), gradients and their logged
    norm relative to the truth's norm, the other metrics as values; the largest of each.
    """

    loss: float
    gradient: float
    metric: float


class Line(NamedTuple):
    """A row of the table."""

    ours64: Distances  # from the truth
    trl: Distances | None  # from the truth; None where TRL cannot say
    ours32: Distances  # from TRL, or there from the truth


def apart(left: Found, right: Found, true: Found) -> Distances:
    scales = {name: max(1.0, abs(value)) for name, value in true.metrics.items()}
    scales["grad_norm"] = true.metrics["grad_norm"]
    far = {
        name: abs(left.metrics[name] - right.metrics[name]) / scale
        for name, scale in scales.items()
    }
    gradient = (left.gradient.double() - right.gradient.double()).norm().item() / scales[
        "grad_norm"
    ]
    return Distances(far["loss"], max(gradient, far.pop("grad_norm")), max(far.values()))


Table = dict[str, Line]


def lines_of(case: Case, kind: Kind) -> Table:
    table = TABLE[kind]
    comparable = [dpo for dpo in table if is_trls(kind, dpo)]
    if kind == "margin":
        case = case._replace(margins=torch.tensor(MARGINS, dtype=torch.float64))
    at_once = case.repeated() if kind == "weight" else case
    theirs = dict(
        zip(
            map(str, comparable),
            their_steps(at_once, comparable) if comparable else [],
            strict=True,
        )
    )
    lines: Table = {}
    for dpo, exact, single in zip(
        table, *(our_steps(case, table, p, kind) for p in ("fp64", "fp32")), strict=True
    ):
        true, trl = exactly(at_once, dpo), theirs.get(str(dpo))
        if kind == "weight":
            del true.metrics["num_tokens"]  # are fed once, whatever a pair weighs
        far = apart(trl, true, true) if trl else None
        lines[named(kind, dpo)] = Line(
            apart(exact, true, true), far, apart(single, trl or true, true)
        )
    return lines


def table_of(folder: Path, case: Case) -> Table:
    lines: Table = {}
    for kind in ("plain", "margin", "weight"):
        lines |= lines_of(case, kind)
    # the grouped product of transformers' experts takes no fp64
    with patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False):
        sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        return lines | lines_of(make_case(folder, "qwen3_moe", **sizes), "experts")


def printed(table: Table) -> str:
    """In Markdown; each cell the distance of the loss, of its gradient and of the metric that is
    farthest.
    """
    lines = [
        "| loss | our fp64 from the truth | TRL from the truth | our fp32 from TRL | |",
        "|---|---|---|---|---|",
    ]
    for kind, dpo in ROWS:
        line = table[named(kind, dpo)]
        ours64, trl, ours32 = (
            ", ".join(f"{x:.0e}" for x in cell) if cell else "-" for cell in line
        )
        far = ours32 if is_trls(kind, dpo) else f"{ours32} from the truth"
        lines.append(f"| {named(kind, dpo)} | {ours64} | {trl} | {far} | {remark(kind, dpo)} |")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def table(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return table_of(tmp_path_factory.mktemp("experts"), case)


# --- the tests ------------------------------------------------------------------------------------


def test_parity_rows_cover_the_cases_that_matter(case: Case) -> None:
    assert {name for dpo in TABLE["plain"] for name in in_trl(dpo)} == {*LOSSES, *BATCH_LOSSES}
    assert any(
        not row["prompt_ids"] for row in case.rows
    )  # its first tokens are counted and not scored
    assert len({len(row["chosen_ids"]) for row in case.rows}) > 2
    chosen, rejected = (case.logps - case.ref_logps).chunk(2)
    assert {bool(margin > 0) for margin in chosen - rejected} == {True, False}
    assert 1 < float((chosen - rejected).abs().max()) < 30
    assert exactly(case, plain("sigmoid")).metrics.keys() == {*LOGGED}


def test_the_table_is_of_settings_that_are_allowed(case: Case) -> None:
    for kind, dpo in ROWS:
        data = {"margin_column": "margin"} if kind == "margin" else {}
        assert (
            tiny_spec(case.folder, dpo=dpo.model_dump(exclude_defaults=True), data=data).dpo == dpo
        )


@pytest.mark.parametrize(("kind", "dpo"), ROWS, ids=[named(*row) for row in ROWS])
def test_value_gradient_and_metrics(table: Table, kind: Kind, dpo: DpoSpec) -> None:
    ours64, trl, ours32 = table[named(kind, dpo)]
    assert max(ours64) < (EXACT_EXPERTS if kind == "experts" else EXACT)
    assert (trl is not None) == is_trls(kind, dpo)
    far = trl or Distances(0.0, 0.0, 0.0)
    assert far.loss < TRL_IS_NEAR
    assert far.gradient < TRL_GRADIENT_IS_NEAR
    assert far.metric < TRL_IS_NEAR
    # no farther from TRL than TRL is from the truth
    assert ours32.loss <= FP32 + far.loss
    assert ours32.gradient <= GRADIENT_FP32 + far.gradient
    assert ours32.metric <= FP32 + far.metric


def test_the_table_can_be_read(table: Table) -> None:
    print(printed(table))
    assert len(printed(table).splitlines()) == len(table) + 2


@pytest.mark.parametrize("name", NOT_WEIGHTED_BY_TRL)
def test_trl_raises_where_the_table_says_so(case: Case, name: LossType) -> None:
    trainer = their_trainer(case, loss_type=[name], use_weighting=True)
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation|single memory location"
    ):
        trainer.compute_loss(trainer.model, inputs).backward()


@pytest.mark.parametrize(
    "name", [name for name in get_args(LossType) if name not in (*OF_SCORES, *NOT_TRLS)]
)
def test_trl_refuses_an_f_divergence_where_our_settings_do(case: Case, name: LossType) -> None:
    with pytest.raises(ValueError, match="is only supported for the following loss types"):
        their_trainer(case, loss_type=name, f_divergence_type="js_divergence")


def test_trl_takes_an_f_divergence_where_our_settings_do(case: Case) -> None:
    taken = [name for name in OF_SCORES if name not in NOT_TRLS]
    their_trainer(case, loss_type=taken, f_divergence_type="js_divergence", label_smoothing=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo_trainer(case: Case, smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    dpo = dpo_spec("simpo", beta=2.0, simpo_gamma=1.2, label_smoothing=smoothing)
    settings = {
        "beta": 2.0,
        "simpo_gamma": 1.2,
        "label_smoothing": smoothing,
        "loss_type": "simpo",
        "alpha": 0.0,
    }
    trainer: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    expected, *_ = CPOTrainer.cpo_loss(trainer, *(case.logps / case.tokens).chunk(2))
    actual = LOSSES["simpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), dpo)
    assert torch.allclose(actual, expected, rtol=1e-12)


def test_the_odds_ratio_of_orpo_is_that_of_trls_orpo_trainer(case: Case) -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer: Any = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = (case.logps / case.tokens).chunk(2)
    expected, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    actual = LOSSES["orpo"](PairTerms.split(case.logps, case.ref_logps, case.tokens), plain("orpo"))
    assert torch.allclose(actual + chosen, -expected.double(), rtol=1e-5)


# --- three steps ----------------------------------------------------------------------------------

TRAINED = [
    dpo_spec("ipo", beta=0.1),
    dpo_spec(**MPO, beta=0.1),
    dpo_spec("sigmoid", beta=0.1, ld_alpha=0.4, use_weighting=True),
]
STEPS_TAKEN = [dpo for dpo in TRAINED for _ in range(STEPS)]


def test_three_steps_are_trls(case: Case) -> None:
    """From the reference, which is where TRL begins."""
    begun = {"policy": "reference", "rate": LR, "restart": STEPS}
    trl, exact = (
        their_steps(case, STEPS_TAKEN, **begun),
        our_steps(case, STEPS_TAKEN, "fp64", **begun),
    )
    for i in range(0, len(trl), STEPS):
        assert trl[i + STEPS - 1].metrics["loss"] < 0.95 * trl[i].metrics["loss"]
    for attention in ("auto", "padded"):
        actual = our_steps(case, STEPS_TAKEN, "fp32", attention=attention, **begun)
        for step, sides in enumerate(zip(actual, trl, exact, strict=True)):
            for name in (*LOGGED, "learning_rate"):
                ours, theirs, true = (side.metrics[name] for side in sides)
                where = (named("plain", STEPS_TAKEN[step]), step % STEPS, name, attention)
                # no farther from TRL than TRL is from the truth
                assert abs(ours - theirs) <= FP32 * max(1.0, abs(true)) + abs(theirs - true), where
                assert abs(theirs - true) <= TRL_IS_NEAR * max(1.0, abs(true)), where


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        with redirect_stdout(sys.stderr):  # what runs say of themselves
            losses_table = table_of(Path(other), make_case(Path(folder)))
        print(printed(losses_table))
