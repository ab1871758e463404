"""Read what a run writes into its directory."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from orchestrator.training.ledger import read
from orchestrator.training.rundir import RunDir


def metric_lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, parsed."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a line that are the same whenever a run is repeated."""
    return {
        name: value for name, value in line.items() if not name.endswith(("runtime", "_per_second"))
    }


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in metric_lines(run_dir) if "loss" in line}


def ledger_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The pair ledger up to the newest checkpoint: each pair of a step once, in the order of steps,
    and no other row in the folder.
    """
    rows = read(RunDir(run_dir))[1].to_pylist()
    keys = [(row["step"], row["pair_id"]) for row in rows]
    assert keys == sorted(set(keys))
    whole = pq.read_table(run_dir / "pairs.parquet").to_pylist()
    assert sorted(whole, key=lambda row: (row["step"], row["pair_id"])) == rows
    return rows
