"""Summarise a finished run: evaluations, sample answers, paths and next steps; without torch."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from orchestrator.settings.run import RunSpec
from orchestrator.training.manifest import step_folder
from orchestrator.training.result import RunResult, evaluated_sets
from orchestrator.training.rundir import RunDir

SHOWN = 100  # maximum characters of a printed answer


def summary(spec: RunSpec, result: RunResult) -> Iterator[str]:
    """Yield the lines about a finished run."""
    run_dir = RunDir(spec.run_dir)
    yield f"finished after step {result.step} ({result.reason})"
    yield from _evaluations(run_dir.metric_lines())
    if result.best_step is not None:
        best = step_folder(run_dir.checkpoints, result.best_step)
        yield (
            f"best     {spec.evaluation.best_metric} {result.best_metric:.6f} after step "
            f"{result.best_step}, {best}"
        )
    yield from _answers(result.samples)
    of_step = f", of step {result.model_step}" if result.best_step is not None else ""
    yield f"model    {_short(result.model)}{of_step}"
    yield f"metrics  {_short(run_dir.metrics)}"
    if spec.wandb.mode != "disabled":
        yield _wandb(run_dir)
    yield from _next(spec, result)


def _evaluations(lines: list[dict[str, Any]]) -> Iterator[str]:
    for name, prefix in evaluated_sets(
        dict.fromkeys(key for line in lines for key in line)
    ).items():
        evaluations = [line for line in lines if f"{prefix}loss" in line]
        before = [line for line in evaluations if not line["step"]]
        for when, line in zip(
            ["before"] * len(before) + ["after"], [*before, evaluations[-1]], strict=True
        ):
            facts = (
                f"loss {line[f'{prefix}loss']:.6f}, rewards/accuracies "
                f"{line[f'{prefix}rewards/accuracies']:.3f}"
            )
            yield f"evaluation {when:<6}  {facts}{f' ({name})' * bool(name)}"


def _answers(samples: list[dict[str, str]]) -> Iterator[str]:
    for sample in samples:
        yield ""
        for part in ("prompt", "before", "after"):
            text = "".join(
                letter for letter in sample[part] if letter.isprintable() or letter.isspace()
            )
            yield f"{part:<8} {shorten(text, SHOWN, placeholder=' ...') or '(nothing)'}"
    if samples:
        yield ""


def _wandb(run_dir: RunDir) -> str:
    """Return the folder of the W&B run, and how to upload offline records."""
    offline = sorted(run_dir.wandb.glob("offline-run-*"))
    if not offline:
        return f"W&B      {_short(run_dir.wandb)}"
    return f"W&B      recorded offline; to upload it: wandb sync {' '.join(map(_short, offline))}"


def _next(spec: RunSpec, result: RunResult) -> Iterator[str]:
    """Yield how to use the result and, after a run with model.init, how to continue with a real
    model.
    """
    yield f"use it   transformers.pipeline('text-generation', '{_short(result.model)}')"
    if spec.training.pair_ledger:
        yield (
            f"look     orchestrator pairs {_short(spec.run_dir)}   # which pairs were learned, "
            "which look mislabelled"
        )
    if spec.model.init is not None:
        yield "next     your own model and pairs: docs/get-started.md"


def _short(path: Path | str | None) -> str:
    """Return a path as a user would type it: relative if it is below the current folder."""
    here = Path.cwd()
    return (
        str(Path(path).relative_to(here)) if path and Path(path).is_relative_to(here) else str(path)
    )
