"""Summarise a finished run: evaluations, sample answers, paths and next steps; without torch."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

from orchestrator.settings.counts import counted
from orchestrator.settings.run import RunSpec
from orchestrator.training.manifest import step_folder
from orchestrator.training.result import RunResult, evaluated_sets
from orchestrator.training.rundir import RunDir
from orchestrator.training.save_interval import duration

MOST_RESTARTS = 10  # the newest are printed; result.json has all
CAUSE_LENGTH = 120
ANSWER_LENGTH = 100  # maximum characters of a printed answer


def summary(spec: RunSpec, result: RunResult) -> Iterator[str]:
    """Yield the lines about a finished run."""
    run_dir = RunDir(spec.run_dir)
    yield f"finished after step {result.step} ({result.reason})"
    yield from _evaluations(run_dir.metric_lines())
    if result.best_step is not None:
        best = step_folder(run_dir.checkpoints, result.best_step)
        value = f"{spec.evaluation.reported_best} {result.best_metric:.6f}"
        yield f"best     {value} after step {result.best_step}, {best}"
    yield from _answers(result.samples)
    of_step = f", of step {result.model_step}" if result.best_step is not None else ""
    yield f"model    {_short(result.model)}{of_step}"
    yield f"metrics  {_short(run_dir.metrics)}"
    yield from _time(result.goodput)
    if spec.wandb.mode != "disabled":
        yield _wandb(run_dir)
    yield from _next(spec, result)


def _evaluations(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the first and the last results of every evaluation set."""
    logged = dict.fromkeys(key for line in lines for key in line)
    for name, prefix in evaluated_sets(logged).items():
        evaluations = [line for line in lines if f"{prefix}loss" in line]
        shown = [("before", line) for line in evaluations if not line["step"]]
        for when, line in [*shown, ("after", evaluations[-1])]:
            loss = f"loss {line[f'{prefix}loss']:.6f}"
            accuracy = f"rewards/accuracies {line[f'{prefix}rewards/accuracies']:.3f}"
            yield f"evaluation {when:<6}  {loss}, {accuracy}{f' ({name})' * bool(name)}"


def _answers(samples: list[dict[str, str]]) -> Iterator[str]:
    for sample in samples:
        yield ""
        for part in ("prompt", "before", "after"):
            letters = (each for each in sample[part] if each.isprintable() or each.isspace())
            text = "".join(letters)
            yield f"{part:<8} {shorten(text, ANSWER_LENGTH, placeholder=' ...') or '(nothing)'}"
    if samples:
        yield ""


def _time(goodput: dict[str, Any] | None) -> Iterator[str]:
    """Yield how much of the time of a run counted, and what its restarts cost."""
    if not goodput or goodput["goodput"] is None:
        return
    wall, restarts = goodput["wall_s"], goodput["restarts"]
    line = f"time     {duration(wall)}, {goodput['goodput']:.0%} of it in training steps"
    if restarts:
        repeated = counted(goodput["repeated_steps"], "step")
        line += f" that counted; {counted(len(restarts), 'restart')}, {repeated} repeated"
        line += f" ({duration(goodput['repeated_s'])})"
    yield line
    for restart in restarts[-MOST_RESTARTS:]:
        took = restart["seconds"]
        again = "not trained" if took is None else f"from {restart['from_step']}, {duration(took)}"
        cause = shorten(restart["cause"], CAUSE_LENGTH, placeholder=" ...")
        yield f"restart  {restart['end']} after step {restart['after_step']}, {again}: {cause}"


def _wandb(run_dir: RunDir) -> str:
    """Return the folder of the W&B run, and how to upload offline records."""
    offline = sorted(run_dir.wandb.glob("offline-run-*"))
    if not offline:
        return f"W&B      {_short(run_dir.wandb)}"
    return f"W&B      recorded offline; to upload it: wandb sync {' '.join(map(_short, offline))}"


def _next(spec: RunSpec, result: RunResult) -> Iterator[str]:
    """Yield how to use the result and, after model.init, how to continue with a real model."""
    yield f"use it   transformers.pipeline('text-generation', '{_short(result.model)}')"
    if spec.training.pair_ledger:
        purpose = "which pairs were learned, which look mislabelled"
        yield f"look     orchestrator pairs {_short(spec.run_dir)}   # {purpose}"
    if spec.model.init is not None:
        yield "next     your own model and pairs: docs/get-started.md"


def _short(path: Path | str | None) -> str:
    """Return a path as a user would type it: relative if it is below the current folder."""
    here = Path.cwd()
    return (
        str(Path(path).relative_to(here)) if path and Path(path).is_relative_to(here) else str(path)
    )
