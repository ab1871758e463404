"""The result of a run, and RUN_DIR/result.json: training/worker.py writes it at the end of a run
(finished, stopped), run/ray/worker.py after an error (refused, failed).
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.durable import sha256_of
from orchestrator.training.rundir import NEWEST_PAIRS, RunDir


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
    # of a finished run: paths in the run directory -> sha256, to notice damage
    files: dict[str, str] = field(default_factory=dict)
    goodput: dict[str, Any] | None = None  # of training/attempts.py


def last_result(run_dir: RunDir) -> RunResult | None:
    """Return the result of the last attempt; None if it has not ended, was refused, failed or died,
    or if the file is damaged.
    """
    result = run_dir.read_result()
    if result.get("status") in ("finished", "stopped"):
        with suppress(TypeError):  # of another version
            return RunResult(**result)
    return None


def finished_already(run_dir: RunDir) -> RunResult | None:
    """Return the result of a finished run; None if the same command still has something to do, as
    after damage to the model or another file.
    """
    result = last_result(run_dir)
    if result is None or result.status != "finished":
        return None
    if result.files:
        return None if run_dir.damaged_files() else result
    # an earlier version has written it
    is_there = Path(result.checkpoint).is_dir() and any(run_dir.model.glob("*.safetensors"))
    return result if is_there else None


def finished_files(run_dir: RunDir) -> dict[str, str]:
    """Return the sha256 of each file of a finished run that its last checkpoint can restore, except
    the model card, which people edit.
    """
    paths = [run_dir.config, run_dir.metrics, run_dir.pairs / NEWEST_PAIRS]
    paths += [*run_dir.tokenizer.rglob("*"), *run_dir.model.rglob("*")]
    kept = sorted(path for path in paths if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(run_dir.path)): sha256_of(path) for path in kept}


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
