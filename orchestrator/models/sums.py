"""Sum the values of tokens over each completion, in fp64.

Legend: B pairs, b some of them, 2B sequences, C completion tokens.
"""

from typing import NamedTuple

import torch

from orchestrator.data.collate import PairBatch


class PairSums(NamedTuple):
    """Per-pair sums over tokens that a loss is computed from, for b pairs, in fp64, the chosen
    first.
    """

    # [b, 2] over completion tokens; those beyond the shorter one have weight dpo.ld_alpha
    logps: torch.Tensor
    chosen: torch.Tensor  # [b] of the chosen, every token with weight 1
    # [b, 2] mean over tokens of log p(label) - log(sum of p^2), without gradient
    aligned: torch.Tensor | None

    def detached(self) -> "PairSums":
        """Return the same sums without gradient."""
        return self._replace(logps=self.logps.detach(), chosen=self.chosen.detach())


def sequence_sums(values: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """Sum each completion: [..., C] -> [..., 2B], all chosen first.

    In fp64: a serial fp32 sum over a completion causes an error of 1e-4 in the loss.
    """
    return pair_sums(values, batch.scored).transpose(-1, -2).flatten(-2)


def pair_sums(values: torch.Tensor, scored: tuple[int, ...]) -> torch.Tensor:
    """Sum each completion in fp64: [..., C] -> [..., B, 2].

    The order is fixed on every device, unlike index_add's.
    """
    parts = [part.sum(-1, dtype=torch.float64) for part in values.split(list(scored), dim=-1)]
    return torch.stack(parts, dim=-1).unflatten(-1, (-1, 2))


def pair_means(values: torch.Tensor, scored: tuple[int, ...]) -> torch.Tensor:
    """Average each completion in fp64: [C] -> [B, 2]; 0 for a completion without tokens."""
    tokens = torch.tensor(scored, dtype=torch.float64).clamp(min=1).view(-1, 2)
    return pair_sums(values, scored) / tokens.to(values.device, non_blocking=True)


class Tails(NamedTuple):
    """The weight of a pair's tokens beyond its shorter completion. LD-DPO: Liu et al. 2024, arXiv
    2409.06411, eq. 10: with n tokens in the shorter one, log p(y) is sum(log p of the first n) +
    ld_alpha * sum(log p of the rest).
    """

    ld_alpha: float | None  # None: they have weight 1, and a sequence is summed in one part

    def parts(self, scored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the number of tokens of each part, from that of each sequence."""
        if self.ld_alpha is None:
            return scored
        both = [
            (min(pair), tokens)
            for pair in zip(scored[::2], scored[1::2], strict=True)
            for tokens in pair
        ]
        return tuple(part for shared, tokens in both for part in (shared, tokens - shared))

    def sums(self, of_parts: torch.Tensor, aligned: torch.Tensor | None) -> PairSums:
        """Combine the sums over parts.

        of_parts: from `pair_sums`, [b, 2], or [2b, 2] with ld_alpha.
        """
        if self.ld_alpha is None:
            return PairSums(of_parts, of_parts[:, 0], aligned)
        shared, rest = of_parts.unflatten(0, (-1, 2)).unbind(-1)
        return PairSums(shared + self.ld_alpha * rest, shared[:, 0] + rest[:, 0], aligned)
