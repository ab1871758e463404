"""Losses over the pairs of the whole global batch have the value and slope of their mean."""

import pytest
import torch

from orchestrator.dpo.losses import BATCH_LOSSES, PairTerms, as_known, batch_losses
from support.loss_terms import EPSILON, spec

EVERY_BATCH_LOSS = spec(0.3, loss_type=list(BATCH_LOSSES), loss_weights=[0.5, 2])


def random_terms(pairs: int, seed: int = 0) -> PairTerms:
    draw = torch.Generator().manual_seed(seed)
    logps, ref_logps = (
        -20 * torch.rand(2 * pairs, generator=draw, dtype=torch.float64) for _ in range(2)
    )
    return PairTerms.split(logps, ref_logps, torch.ones(2 * pairs, dtype=torch.int64))


def picked(terms: PairTerms, pairs: list[int]) -> PairTerms:
    return PairTerms(*(None if term is None else term[pairs] for term in terms))


def by_sorting(terms: PairTerms) -> torch.Tensor:
    """The mean of EVERY_BATCH_LOSS, as the paper has it."""
    w, x, ref_w, ref_x = terms[:4]
    margins = [0.3 * ((w - x).sort().values - (ref_w - ref_x).sort().values)]
    margins.append(0.3 * ((w - ref_w).sort().values - (x - ref_x).sort().values))
    paired, unpaired = (
        -(1 - EPSILON) * m.sigmoid().log() - EPSILON * (-m).sigmoid().log() for m in margins
    )
    return (0.5 * paired + 2 * unpaired).mean()


def test_the_losses_of_sorted_pairs_have_value_and_slope_of_their_mean() -> None:
    terms = random_terms(7)
    leaves = [logps.clone().requires_grad_() for logps in terms[:2]]
    mean = by_sorting(PairTerms(*leaves, *terms[2:]))
    values = batch_losses(terms, EVERY_BATCH_LOSS, torch.ones(7, dtype=torch.float64))
    assert values[:, 0].mean().item() == pytest.approx(mean.item(), rel=1e-14)
    for column, slope in enumerate(torch.autograd.grad(mean, leaves), start=1):
        assert torch.allclose(values[:, column] / 7, slope, rtol=1e-12)


def test_batch_losses_do_not_depend_on_the_order_of_pairs() -> None:
    terms, weights = random_terms(7), torch.tensor([1, 2, 0.5, 1, 1, 3, 1], dtype=torch.float64)
    order = [3, 1, 6, 0, 5, 2, 4]
    values = batch_losses(picked(terms, order), EVERY_BATCH_LOSS, weights[order])
    assert torch.allclose(values, batch_losses(terms, EVERY_BATCH_LOSS, weights)[order], rtol=1e-13)


def test_a_weight_of_two_is_the_pair_twice_also_where_losses_sort_pairs() -> None:
    terms, ones = random_terms(5), torch.ones(7, dtype=torch.float64)
    weights, rows = torch.tensor([1, 2, 1, 1, 2], dtype=torch.float64), [0, 1, 1, 2, 3, 4, 4]
    values = batch_losses(terms, EVERY_BATCH_LOSS, weights)
    repeated = batch_losses(picked(terms, rows), EVERY_BATCH_LOSS, ones)
    means = torch.zeros_like(values).index_add(0, torch.tensor(rows), repeated) / weights[:, None]
    assert torch.allclose(values, means, rtol=1e-13)
    thirds = batch_losses(terms, EVERY_BATCH_LOSS, weights / 3)  # only their ratios count
    assert torch.allclose(values, thirds, rtol=1e-13)


def test_a_known_loss_has_its_value_and_its_slopes() -> None:
    of_batch = torch.tensor([[3.0, -0.5, 0.25], [7.0, 2.0, 1.0]], dtype=torch.float64)
    logps = torch.tensor([[-8.0, -9.0], [-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    losses = as_known(of_batch, logps)
    assert losses.tolist() == [3, 7]
    assert torch.equal(torch.autograd.grad(losses.sum(), logps)[0], of_batch[:, 1:])
