"""Collators as users write them, for data.collator."""

import json
import os
from typing import Any

import torch

from orchestrator.data.collate import CollateContext

Rows = list[dict[str, Any]]


def plain(rows: Rows) -> dict[str, torch.Tensor]:
    """As a TRL user would write it: no context, its own padding (to a multiple of 8)."""
    width = (
        -(
            -max(
                len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))
                for r in rows
            )
            // 8
        )
        * 8
    )
    keys = ("input_ids", "attention_mask", "completion_mask")
    values = {key: torch.zeros(2 * len(rows), width, dtype=torch.long) for key in keys}
    for half, side in enumerate(("chosen_ids", "rejected_ids")):
        for i, row in enumerate(rows):
            ids = row["prompt_ids"] + row[side]
            values["input_ids"][half * len(rows) + i, : len(ids)] = torch.tensor(ids)
            values["attention_mask"][half * len(rows) + i, : len(ids)] = 1
            values["completion_mask"][half * len(rows) + i, len(row["prompt_ids"]) : len(ids)] = 1
    return values


def aware(rows: Rows, context: CollateContext) -> dict[str, torch.Tensor]:
    """Writes what it was told, and what it saw, into a file for each rank whose name begins with
    SEEN, where that is set.
    """
    if "SEEN" in os.environ:
        lengths = [
            (len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows
        ]
        seen = {
            "pairs": [row["pair_id"] for row in rows],
            "tokens": sum(2 * p + c + r for p, c, r in lengths),
        }
        with open(f"{os.environ['SEEN']}.{context.rank}", "a") as file:
            file.write(json.dumps({**vars(context), **seen}) + "\n")
    return plain(rows)
