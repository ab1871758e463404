"""The result of a run, and RUN_DIR/result.json: training/worker.py writes it at the end of a run
(finished, stopped), run/ray/worker.py after an error (refused, failed).
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from orchestrator.training.rundir import RunDir


@dataclass(frozen=True)
class FitResult:
    """The result of the training loop, before the export."""

    status: str  # finished | stopped
    reason: str
    step: int
    checkpoint: Path
    best_step: int | None  # by evaluation.metric_for_best
    best_metric: float | None


@dataclass(frozen=True)
class RunResult:
    """The result of a run that finished or stopped; the content of its RUN_DIR/result.json."""

    status: str  # finished: the model is exported; stopped: saved, the same command resumes
    reason: str
    step: int
    checkpoint: str
    model: str | None
    model_step: int | None = None
    best_step: int | None = None  # by evaluation.metric_for_best
    best_metric: float | None = None
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt, before, after


def last_result(run_dir: RunDir) -> RunResult | None:
    """Return the result of the last attempt; None if it has not ended, was refused, failed or died,
    or if the file is damaged.
    """
    try:
        result = json.loads(run_dir.result.read_text())
        return RunResult(**result) if result["status"] in ("finished", "stopped") else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def finished_already(run_dir: RunDir) -> RunResult | None:
    """Return the result of a finished run; None if the same command still has something to do."""
    result = last_result(run_dir)
    if result is None or result.status != "finished" or not Path(result.checkpoint).is_dir():
        return None
    return result if any(run_dir.model.glob("*.safetensors")) else None


def finished_line(run_dir: RunDir) -> str:
    """Return a line with the time at which a run finished, and how to train once more."""
    when = datetime.fromtimestamp(run_dir.result.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    name = run_dir.path.name
    return (
        f"{name} has finished already, on {when}: nothing to do; run.name={name}-2 trains once more"
    )


def evaluated_sets(logs: Collection[str]) -> dict[str, str]:
    """Return the names of the evaluation sets with metrics in `logs`, and the prefix of these:
    eval_ for a single set without a name, else eval_NAME_.
    """
    suffix = "rewards/accuracies"  # every evaluation has it, and a loss
    prefixes = [
        name.removesuffix(suffix)
        for name in logs
        if name.startswith("eval_") and name.endswith(suffix)
    ]
    return {prefix[len("eval_") : -1]: prefix for prefix in prefixes if f"{prefix}loss" in logs}
