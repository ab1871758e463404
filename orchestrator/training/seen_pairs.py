"""Keep the results of each pair of a rank's steps for the pair ledger, until the next save.

Legend: B pairs of a micro-batch, P of this rank's pairs in a step.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from orchestrator.data.collate import PairBatch
from orchestrator.dpo.losses import PairTerms, rewards
from orchestrator.dpo.step import StepOutput
from orchestrator.settings.loss import DpoSpec
from orchestrator.training.ledger import NUMBERS, SCHEMA


class _Step(NamedTuple):
    """The pairs of one step on this rank."""

    step: int
    epoch: int
    pair_ids: NDArray[np.int64]  # [P]
    tokens: NDArray[np.int64]  # [2, P]
    numbers: NDArray[np.float64]  # [len(NUMBERS), P]


class SeenPairs:
    """The pairs of this rank's steps since the last save, without fillers.

    `add` does not wait for the device.
    """

    def __init__(self, dpo: DpoSpec) -> None:
        self.dpo = dpo
        self._steps: list[_Step] = []
        # being copied from the device
        self._coming: tuple[int, int, list[PairBatch], torch.Tensor, Any] | None = None

    def add(self, step: int, epoch: int, outputs: list[tuple[PairBatch, StepOutput]]) -> None:
        """Add a step: its micro-batches, on the host, and their outputs."""
        # does not wait: the host has waited for this step's gradient, which came later
        self._arrived()
        mine = [(batch, output) for batch, output in outputs if batch.pair_weights.any()]
        if not mine:
            return
        numbers = torch.cat(
            [part.detach() for _, o in mine for part in (o.logps, o.ref_logps, o.losses)]
        )
        copied = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        event = torch.cuda.Event() if numbers.is_cuda else None
        if event is not None:
            event.record()
        self._coming = step, epoch, [batch for batch, _ in mine], copied, event

    def take(self) -> pa.Table:
        """Return all rows and remove them here."""
        self._arrived()
        steps, self._steps = self._steps, []
        return _table(steps, self.dpo) if steps else SCHEMA.empty_table()

    def _arrived(self) -> None:
        """Store the step whose numbers were being copied, and free their pinned memory."""
        if self._coming is None:
            return
        step, epoch, batches, copied, event = self._coming
        if event is not None:
            event.synchronize()
        ends = len(NUMBERS) * np.cumsum([len(batch.pair_ids) for batch in batches])
        numbers = [part.reshape(len(NUMBERS), -1) for part in np.split(copied.numpy(), ends[:-1])]
        tokens = [batch.completion_tokens.view(2, -1).numpy() for batch in batches]
        ids = [batch.pair_ids.numpy() for batch in batches]
        arrays = [
            np.concatenate(ids),
            *(np.concatenate(each, axis=1) for each in (tokens, numbers)),
        ]
        self._steps.append(_Step(step, epoch, *arrays))
        self._coming = None


def _table(steps: list[_Step], dpo: DpoSpec) -> pa.Table:
    numbers = np.concatenate([each.numbers for each in steps], axis=1)
    tokens = np.concatenate([each.tokens for each in steps], axis=1)
    counts = [len(each.pair_ids) for each in steps]
    arrays = (numbers[:2], numbers[2:4], tokens)
    logps, ref_logps, lengths = (torch.from_numpy(array).flatten() for array in arrays)
    chosen, rejected = rewards(PairTerms.split(logps, ref_logps, lengths), dpo)
    columns = {
        **dict(zip(NUMBERS, numbers, strict=True)),
        "pair_id": np.concatenate([each.pair_ids for each in steps]),
        "step": np.repeat([each.step for each in steps], counts),
        "epoch": np.repeat([each.epoch for each in steps], counts),
        "margin": (chosen - rejected).numpy(),
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
