"""The block dpo: the losses, the facts about each, and their options."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator
from pydantic_core import PydanticKnownError

from orchestrator.settings.base import Block, check_user_code
from orchestrator.settings.counts import counted
from orchestrator.settings.data import DataSpec
from orchestrator.settings.errors import UserError
from orchestrator.settings.model import ModelSpec

# TRL's names; from cdpo on, losses that its DPOTrainer does not have
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "cdpo",
    "simpo",
    "orpo",
]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass(frozen=True)
class LossTraits:
    """Facts about a loss that decide which settings it uses and how a step computes it."""

    uses_smoothing: bool = False
    """Uses dpo.label_smoothing."""
    takes_margin: bool = False
    """Uses data.margin_column, which is subtracted from the difference of a pair's rewards."""
    takes_divergence: bool = False
    """Supports dpo.f_divergence_type. It uses the difference of a pair's scores, in which an
    unknown term that depends only on the prompt cancels; sft uses no scores.
    """
    needs_whole_batch: bool = False
    """Compares all pairs of the global batch with each other, for which the policy runs twice."""
    is_token_mean: bool = False
    """Is a mean over the chosen tokens of the global batch, not over its pairs."""
    beta_is_per_token: bool = False
    """Multiplies log-probs per token by dpo.beta, which is therefore larger."""
    uses_ld_alpha: bool = True
    """Depends on dpo.ld_alpha."""
    own_settings: tuple[str, ...] = ()
    """Settings of the block dpo that only this loss uses."""


LOSS_TRAITS: dict[str, LossTraits] = {
    "sigmoid": LossTraits(takes_margin=True, takes_divergence=True),
    "hinge": LossTraits(takes_margin=True, takes_divergence=True),
    "ipo": LossTraits(takes_divergence=True),
    "exo_pair": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "nca_pair": LossTraits(),
    "robust": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "bco_pair": LossTraits(),
    "sppo_hard": LossTraits(),
    "aot": LossTraits(uses_smoothing=True, needs_whole_batch=True),
    "aot_unpaired": LossTraits(uses_smoothing=True, needs_whole_batch=True),
    "apo_zero": LossTraits(),
    "apo_down": LossTraits(),
    "discopop": LossTraits(
        takes_margin=True, takes_divergence=True, own_settings=("discopop_tau",)
    ),
    "sft": LossTraits(takes_divergence=True, is_token_mean=True, uses_ld_alpha=False),
    "sigmoid_norm": LossTraits(takes_margin=True, takes_divergence=True, beta_is_per_token=True),
    "cdpo": LossTraits(uses_smoothing=True, takes_margin=True, takes_divergence=True),
    "simpo": LossTraits(
        uses_smoothing=True,
        takes_margin=True,
        beta_is_per_token=True,
        own_settings=("simpo_gamma",),
    ),
    "orpo": LossTraits(),
}
USERS_LOSS = LossTraits(
    uses_smoothing=True,
    takes_margin=True,
    takes_divergence=True,
    own_settings=tuple(name for traits in LOSS_TRAITS.values() for name in traits.own_settings),
)
"""A user's own loss may use any setting of its block."""
SMOOTHED = tuple(name for name, traits in LOSS_TRAITS.items() if traits.uses_smoothing)
OF_BATCH = tuple(name for name, traits in LOSS_TRAITS.items() if traits.needs_whole_batch)
OF_SCORES = tuple(name for name, traits in LOSS_TRAITS.items() if traits.takes_divergence)
WITH_MARGIN = tuple(name for name, traits in LOSS_TRAITS.items() if traits.takes_margin)


class DpoSpec(Block):
    """The loss. Names and defaults are TRL's."""

    loss_type: str | list[str] = "sigmoid"
    """Loss, or list of losses to add: sigmoid is DPO (Rafailov et al. 2023, eq. 7), [sigmoid, sft]
    is RPO. The functions with these names in orchestrator/dpo/losses.py cite papers and equations.
    docs/losses.md lists the names. Your own loss as module:attr: a function (terms: PairTerms, dpo:
    DpoSpec) -> [B], with the types of that file.
    """
    loss_weights: list[float] | None = None
    """Factor of each loss, in the order of loss_type; 1 each when not set. Dimensionless."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: reward = beta * log(policy / reference).

    Dimensionless.
    """
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """robust, aot, aot_unpaired, cdpo, simpo: probability that a pair's label is wrong; exo_pair:
    fraction of the label on the rejected completion, more than 0.
    """
    f_divergence_type: FDivergence = "reverse_kl"
    """Divergence between policy and reference (f-DPO: Wang et al. 2023, arXiv 2309.16240), for
    losses over the difference of a pair's scores.
    """
    f_alpha_divergence_coef: float = 0.5
    """Alpha of alpha_divergence; 1 is reverse_kl. Dimensionless."""
    ld_alpha: float | None = Field(None, ge=0, le=1)
    """Weight of the tokens of the longer completion beyond the length of the shorter one, in the
    log-probs of policy and reference (LD-DPO: Liu et al. 2024, arXiv 2409.06411); 1 when not set.
    """
    use_weighting: bool = False
    """Weight the loss of a pair by its probability under the policy (WPO: Zhou et al.

    2024, arXiv 2406.11827).
    """
    discopop_tau: float = Field(0.05, gt=0)
    """Temperature of the modulation in discopop. Dimensionless."""
    router_aux_loss_coef: float | None = None
    """0: train a mixture of experts without its load-balancing loss, which is not supported; if not
    set, a model whose config has a coefficient for it is an error.
    """
    simpo_gamma: float = Field(0.5, ge=0)
    """Target margin of simpo, in units of its reward: beta times log-prob per token."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, list | tuple) else [value]
        own = [name for name in names if isinstance(name, str) and ":" in name]
        if not names or any(name not in (*get_args(LossType), *own) for name in names):
            raise PydanticKnownError(
                "literal_error", {"expected": ", ".join(map(repr, get_args(LossType)))}
            )
        # a list of one equals its entry, also on resume
        return names[0] if len(names) == 1 else names

    @property
    def loss_types(self) -> list[str]:
        """Return the losses as a list."""
        return self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def own_losses(self) -> list[str]:
        """Return the user's own losses, as module:attr; they may read any setting of this block."""
        return [name for name in self.loss_types if ":" in name]

    @property
    def traits(self) -> list[LossTraits]:
        """Return the facts about each loss."""
        return [LOSS_TRAITS.get(name, USERS_LOSS) for name in self.loss_types]

    @property
    def needs_whole_batch(self) -> bool:
        """Return whether a loss needs the whole global batch."""
        return any(traits.needs_whole_batch for traits in self.traits)

    @property
    def weights(self) -> list[float]:
        """Return the factor of each loss."""
        return self.loss_weights or [1.0] * len(self.loss_types)

    def check(self) -> None:
        """Check what the losses require, and that one of them uses each option."""
        for name in self.own_losses:
            check_user_code("dpo.loss_type", name)
        _check_loss_weights(self)
        _check_smoothing(self)
        _check_divergence(self)
        _check_own_settings(self)
        listed = ", ".join(self.loss_types)
        if self.router_aux_loss_coef not in (None, 0):
            key, rule = "dpo.router_aux_loss_coef", "the load-balancing loss of a mixture of "
            rule += "experts is not supported"
            raise UserError(key, self.router_aux_loss_coef, rule, "set it to 0")
        if self.use_weighting and self.needs_whole_batch:
            rule = f"weights single pairs, but {listed} compares sorted pairs with each other"
            cure = "remove it, or use another dpo.loss_type"
            raise UserError("dpo.use_weighting", self.use_weighting, rule, cure)
        if self.ld_alpha is not None and not any(each.uses_ld_alpha for each in self.traits):
            rule = f"is not used by {listed}, which weights all tokens of the chosen completion "
            raise UserError("dpo.ld_alpha", self.ld_alpha, f"{rule}equally", "remove it")

    def check_model_and_data(self, model: ModelSpec, data: DataSpec) -> None:
        """Check that the losses work with dropout and use the margins.

        Raises:
            UserError: they do not.
        """
        listed = ", ".join(self.loss_types)
        if self.needs_whole_batch and not model.disable_dropout:
            key, rule = "model.disable_dropout", f"{listed} runs the policy twice per step, and "
            rule += "dropout would differ between the two passes"
            cure = "set it to true, or use another dpo.loss_type"
            raise UserError(key, model.disable_dropout, rule, cure)
        margins = data.margin_column
        if margins is not None and not any(each.takes_margin for each in self.traits):
            rule = f"is used by {', '.join(WITH_MARGIN)}, not by {listed}"
            cure = "remove it, or set dpo.loss_type to one of these"
            raise UserError("data.margin_column", margins, rule, cure)


def _check_loss_weights(dpo: DpoSpec) -> None:
    count, key = len(dpo.loss_types), "dpo.loss_weights"
    if len(dpo.weights) != count:
        rule = f"is not one number for each of {', '.join(dpo.loss_types)}"
        cure = f"set {counted(count, 'number')}, or remove it: then each is 1"
        raise UserError(key, dpo.loss_weights, rule, cure)
    if not any(dpo.weights):
        rule = "all weights are 0, so nothing would train"
        cure = "set one to another value, or remove it: then each is 1"
        raise UserError(key, dpo.loss_weights, rule, cure)


def _check_smoothing(dpo: DpoSpec) -> None:
    key, smoothing = "dpo.label_smoothing", dpo.label_smoothing
    if smoothing == 0 and "exo_pair" in dpo.loss_types:
        cure = "set it to 0.001, as in its paper"
        raise UserError(key, smoothing, "exo_pair needs its logarithm", cure)
    if smoothing >= 0.5 and "robust" in dpo.loss_types:
        rule = "robust divides by 1 - 2 * dpo.label_smoothing, which must be more than 0"
        raise UserError(key, smoothing, rule, "set it below 0.5, for example to 0.1")
    if smoothing > 0 and not any(traits.uses_smoothing for traits in dpo.traits):
        rule = f"is used by {', '.join(SMOOTHED)}, not by {', '.join(dpo.loss_types)}"
        cure = "remove it, or set dpo.loss_type=cdpo (sigmoid with smoothed labels) or robust"
        raise UserError(key, smoothing, rule, cure)


def _check_divergence(dpo: DpoSpec) -> None:
    divergence, alpha = dpo.f_divergence_type, dpo.f_alpha_divergence_coef
    both = zip(dpo.loss_types, dpo.traits, strict=True)
    without = [name for name, traits in both if not traits.takes_divergence]
    if divergence != "reverse_kl" and without:
        rule = "works only for losses of the difference of a pair's scores, not for "
        cure = f"remove it, or set dpo.loss_type to one of {', '.join(OF_SCORES)}"
        raise UserError("dpo.f_divergence_type", divergence, f"{rule}{', '.join(without)}", cure)
    if alpha != 0.5 and divergence != "alpha_divergence":
        rule = f"is not used by {divergence}"
        cure = "remove it, or set dpo.f_divergence_type=alpha_divergence"
        raise UserError("dpo.f_alpha_divergence_coef", alpha, rule, cure)


def _check_own_settings(dpo: DpoSpec) -> None:
    """Check that a selected loss uses each setting that belongs to one loss."""
    used = {name for traits in dpo.traits for name in traits.own_settings}
    for loss, traits in LOSS_TRAITS.items():
        for name in traits.own_settings:
            value = getattr(dpo, name)
            if name not in used and value != DpoSpec.model_fields[name].default:
                rule = f"is not used by {', '.join(dpo.loss_types)}"
                cure = f"remove it, or set dpo.loss_type={loss}"
                raise UserError(f"dpo.{name}", value, rule, cure)
