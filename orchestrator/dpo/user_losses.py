"""Check a user's losses on synthetic pairs, before anything trains with them."""

from typing import Any

import torch

from orchestrator.dpo.losses import Loss, PairTerms
from orchestrator.settings.errors import UserError
from orchestrator.settings.loss import DpoSpec
from orchestrator.user_code import MACHINE_FAILURES, user_attribute, user_code


def check_losses(dpo: DpoSpec, with_margins: bool) -> None:
    """Call each of a user's losses on synthetic pairs (with margins, if the data have them).

    Raises:
        UserError: it cannot be imported, or does not return a loss per pair that depends on that
            pair only and has a gradient.
    """
    cure = (
        "return [B]: each pair's loss, from its own terms only, differentiable in "
        "chosen_logps or rejected_logps"
    )
    for name in dpo.own_losses:
        loss = user_attribute("dpo.loss_type", name)
        with user_code("dpo.loss_type", name, "for synthetic pairs"):
            rule = _broken_rule(loss, dpo, with_margins)
        if rule:
            raise UserError("dpo.loss_type", name, rule, cure)


def _broken_rule(loss: Loss, dpo: DpoSpec, with_margins: bool) -> str:
    """Return what is wrong with a user's loss; empty if nothing is."""
    logps, terms = _synthetic_terms(dpo, with_margins)
    pairs = f"for {len(terms.chosen_logps)} synthetic pairs"
    try:
        losses: Any = loss(terms, dpo)
        if not isinstance(losses, torch.Tensor) or losses.shape != terms.chosen_logps.shape:
            is_tensor = isinstance(losses, torch.Tensor)
            shape = tuple(losses.shape) if is_tensor else type(losses).__name__
            return f"returns {shape} {pairs}"
        if not losses.is_floating_point():
            return f"returns {losses.dtype} {pairs}"
        if not losses.isfinite().all():
            return f"returns {losses.tolist()} {pairs}, which are not finite"
        alone = torch.cat([loss(terms.of(slice(i, i + 1)), dpo) for i in range(len(losses))])
    except MACHINE_FAILURES:
        raise
    except Exception as error:  # user code may raise anything
        return f"raises {type(error).__name__} ({error}) {pairs}"
    if not torch.allclose(losses, alone):
        return f"returns {losses.tolist()} {pairs}, but {alone.tolist()} for one at a time"
    if not losses.requires_grad:
        return f"returns losses without a gradient {pairs}"
    [slope] = torch.autograd.grad(losses.sum(), logps, allow_unused=True)
    if slope is None or not slope.isfinite().all():
        return f"has the gradient {None if slope is None else slope.tolist()} {pairs}"
    return ""


def _synthetic_terms(dpo: DpoSpec, with_margins: bool) -> tuple[torch.Tensor, PairTerms]:
    """Return the policy's log-probs [2B], which have a gradient, and the terms of the pairs."""
    fp64 = torch.float64
    logps = [-9.0, -30.0, -12.0, -11.0, -24.0, -12.5]
    policy = torch.tensor(logps, dtype=fp64, requires_grad=True)
    reference = torch.tensor([-10.0, -28.0, -12.0, -10.0, -25.0, -12.0], dtype=fp64)
    margins = torch.tensor([0.5, 1.0, 2.0], dtype=fp64) if with_margins else None
    terms = PairTerms.split(policy, reference, torch.tensor([4, 9, 5, 3, 9, 6]), margins)
    if dpo.use_weighting:
        terms = terms._replace(on_policy=torch.full_like(reference[:3], 0.5))
    return policy, terms
