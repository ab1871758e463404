"""Compute losses over all pairs of the global batch from the log-probs of all ranks.

Legend: B pairs of a micro-batch, n of all micro-batches of a rank, N of all ranks.
"""

from collections.abc import Sequence

import torch

from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.losses import PairTerms, batch_losses
from orchestrator.dpo.step import METRICS, StepOutput
from orchestrator.engines.base import Engine
from orchestrator.settings.loss import DpoSpec
from orchestrator.world import World


class GlobalBatch:
    """The log-probs of the pairs of one global batch, gathered once after all of its
    micro-batches.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        # [8, B] on the device, in the layout that `_losses_in_order` reads
        self.parts: list[torch.Tensor] = []

    def add(self, batch: PairBatch, output: StepOutput) -> None:
        """Add a micro-batch (on the device)."""
        of_sequences = (output.logps, output.ref_logps, batch.completion_tokens.double())
        rows = [
            batch.pair_ids.double(),
            batch.pair_weights,
            *torch.cat([each.view(2, -1) for each in of_sequences]),
        ]
        self.parts.append(torch.stack(rows))

    def shares(self, dpo: DpoSpec) -> Sequence[torch.Tensor]:
        """Return PairBatch.of_batch [B, 3] of each micro-batch, on the host.

        Collective; waits for the device.
        """
        mine = torch.cat(self.parts, dim=1).cpu()
        ranks = self.world.gather(mine)
        # sorted by id, so that the result for equal values does not depend on which rank had which
        # pair
        losses, place = _losses_in_order(torch.cat(ranks, dim=1), dpo)
        before = sum(part.shape[1] for part in ranks[: self.world.rank])
        return losses[place[before : before + mine.shape[1]]].split(
            [part.shape[1] for part in self.parts]
        )

    def metric_sums(self, dpo: DpoSpec) -> torch.Tensor:
        """Return the part of the metric sums [len(METRICS), 2] that an evaluated batch lacks.

        Collective.
        """
        values = torch.cat([share[:, 0] for share in self.shares(dpo)])
        weights = torch.cat([part[1] for part in self.parts])
        sums = weights.new_zeros(len(METRICS), 2)
        sums[METRICS.index("loss"), 0] = values.to(weights.device) @ weights
        return sums


def _losses_in_order(seen: torch.Tensor, dpo: DpoSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute of_batch [N, 3] from [8, N], sorted by id, 0 for fillers; return it with the place of
    each column.
    """
    order = seen[0].argsort(stable=True)
    _, weights, *logps_and_tokens = seen[:, order]
    real = weights > 0
    logps, ref_logps, tokens = (
        each[:, real].flatten() for each in torch.stack(logps_and_tokens).view(3, 2, -1)
    )
    losses = seen.new_zeros(len(weights), 3)
    losses[real] = batch_losses(PairTerms.split(logps, ref_logps, tokens), dpo, weights[real])
    return losses, order.argsort()


def first_pass(
    engine: Engine, batches: list[PairBatch], counts: Counts, dpo: DpoSpec, world: World
) -> list[PairBatch]:
    """Return a rank's micro-batches of a step with their losses over the global batch and the
    reference's log-probs, which the pass with gradient then does not compute again. Collective.

    The log-probs come from a forward pass without dropout; the rules of the settings require it
    off.
    """
    seen = GlobalBatch(world)
    outputs: list[StepOutput] = []
    for batch in batches:
        on_device = batch.to(world.device)
        outputs.append(engine.evaluate(on_device, counts))
        seen.add(on_device, outputs[-1])
    shares = seen.shares(dpo)
    return [
        batch._replace(ref_logps=output.ref_logps, of_batch=share)
        for batch, output, share in zip(batches, outputs, shares, strict=True)
    ]
