"""The table of losses to compare, the case they run on, and an fp64 computation of each of them."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.data.pairs import PairRow
from orchestrator.dpo.step import METRICS
from orchestrator.models.policy import load_tokenizer
from orchestrator.settings.loss import OF_BATCH, OF_SCORES, SMOOTHED, WITH_MARGIN, DpoSpec, LossType
from support.tiny_settings import TINY_MODEL, random_rows, tiny_spec, write_jsonl
from support.training_parity import exact_model
from support.trl_trainer import trl_tokens

BETA, LR, STEPS, PAIRS, MAX_LENGTH = 0.3, 0.03, 3, 6, 40
NO_RATE, NO_CLIPPING = 1e-30, 1e9
# of pairs; in TRL, each of them stands there twice as often
WEIGHTS = (0.5, 1.0, 0.5, 1.5, 1.0, 0.5)
MARGINS = (0.4, -0.2, 0.0, 0.9, 0.1, 0.6)
EXACT = 1e-9  # relative, of our fp64 and the computation here
EXACT_EXPERTS = 1e-6  # transformers' router is in fp32 whatever the model
# Of our fp32; TRL's distance from the truth comes on top. On CPUs with AVX2 alpha_divergence with a
# coefficient of 1.7, whose power makes more of a rounding, 2.1e-6; any other loss on any CPU 9e-7.
FP32 = 4e-6
TRL_IS_NEAR = 1e-4  # how far TRL may be from the truth; what is further is another loss
GRADIENT_FP32 = 5e-5  # of discopop with margins 3e-5: its tau makes 20 times as much of a rounding
TRL_GRADIENT_IS_NEAR = 1e-3  # of ipo with forward_kl, whose parts cancel, 9e-5; of any other 1e-5
# by both, of every step; and learning_rate, which is NO_RATE in the table
LOGGED = (*METRICS, "grad_norm", "epoch")
NOT_TRLS = ("cdpo", "simpo", "orpo")  # no losses of TRL's DPOTrainer
# it raises: an in-place product would change what the backward pass needs
NOT_WEIGHTED_BY_TRL = ("hinge", "sft")
# there of a micro-batch, here of the global batch: the same where that is all
SPLIT_IN_TRL = ("sft", *OF_BATCH)
TWINS: dict[str, LossType] = {  # a user's own losses, and those of TRL that they are
    "support.user_losses:logistic": "sigmoid",
    "support.user_losses:squared": "ipo",
    "support.user_losses:absolute": "bco_pair",
}
LOGISTIC, SQUARED, ABSOLUTE = TWINS


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
        # not sft, which ld_alpha does not change
        *(with_option(name, ld_alpha=0.4) for name in get_args(LossType) if name != "sft"),
        # not losses of the batch, which refuse it
        *(
            with_option(name, use_weighting=True)
            for name in get_args(LossType)
            if name not in OF_BATCH
        ),
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
        # which acts in the second alone
        dpo_spec(["sigmoid", "exo_pair"], loss_weights=[0.5, 1], label_smoothing=0.1),
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
    rows: list[PairRow]  # TRL's token ids
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


def looked_at(model: Any, rows: list[PairRow]) -> Seen:
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
    # of chosen and of rejected
    ones, entropy, logits, top1 = case.policy.sums.t().unflatten(1, (2, -1)).sum(2)
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
