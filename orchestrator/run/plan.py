"""Plan a run without starting it: run the checks of its start that need no cluster."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from orchestrator.data.pair_cache import NoPairs
from orchestrator.data.repeats import repeat_lines
from orchestrator.data.shapes import note_lines
from orchestrator.data.sources import check_rows
from orchestrator.run.checks.hub import unreachable_models, unread_sources
from orchestrator.run.facts import Outlook, check_names, row_counts, run_facts, total
from orchestrator.run.local.rehearsal import is_small, rehearse, scratch_cache
from orchestrator.settings.run import RunSpec
from orchestrator.training.prepare import Parts, check_code, check_device, load_parts, tokenize

SMALL_ROWS = 2048  # total rows up to which all are tokenised, and a small model runs a trial step
ELSEWHERE = ("RAY_ADDRESS", "SLURM_JOB_ID")  # set if a cluster or a batch job has the devices
FIRST_ROWS = 256  # rows of each source to tokenise if there are more


def planned(spec: RunSpec, starts_here: bool = True) -> dict[str, Any]:
    """Run the checks of a run's start, and return facts about the run by name.

    starts_here: False if other machines train, whose devices are unknown.

    "notes" lists unusual settings and skipped checks. Other facts are None if data must be loaded
    to know them.

    Raises:
        UserError: an error that the run would raise before its first step.
    """
    check_names(spec)
    on_this_device = starts_here and not _trains_on_other_devices(spec)
    return run_facts(spec, _check_start(spec, on_this_device))


def _trains_on_other_devices(spec: RunSpec) -> bool:
    """Return whether the run has devices that this process does not see: GPUs, or elsewhere."""
    return bool(spec.cluster.resources.get("GPU")) or any(name in os.environ for name in ELSEWHERE)


def _check_start(spec: RunSpec, on_this_device: bool) -> Outlook:
    """Run the checks of a run's start, in the same order and with a temporary cache.

    Raises:
        UserError: the first failed check.
    """
    check_code(spec)
    gpus = torch.cuda.device_count()
    if on_this_device:
        check_device(spec, torch.device("cuda" if gpus else "cpu"))
    if names := unreachable_models(spec):
        why = "is not checked; it is not cached here, and the hub does not answer"
        notes = tuple(f"{key} = {name}: {why}" for key, name in names.items())
        return Outlook(row_counts(spec), gpus=gpus, notes=notes)
    names = unread_sources(spec)
    unread = tuple(
        f"{key} = {name}: its rows are checked where the run starts" for key, name in names.items()
    )
    if unread and spec.model.init is not None:  # the tokenizer of model.init is trained on the rows
        return Outlook(row_counts(spec), gpus=gpus, notes=unread)
    with scratch_cache(spec) as scratch:
        parts = load_parts(scratch)
        positions = getattr(parts.config.get_text_config(), "max_position_embeddings", None)
        if unread:
            return Outlook(row_counts(spec), positions=positions, gpus=gpus, notes=unread)
        return _check_rows(scratch, parts)._replace(positions=positions, gpus=gpus)


def _check_rows(spec: RunSpec, parts: Parts) -> Outlook:
    """Tokenise all rows or the first ones, and run a trial step if data and models are small.

    Raises:
        UserError: the run would raise it, too.
    """
    counts = row_counts(spec)
    if (rows := total(counts.values())) is None or rows > SMALL_ROWS:
        return Outlook(counts, notes=tuple(_check_large_data(spec, parts)))
    prepared = tokenize(spec, parts)
    sets = {spec.data.eval_key(name): pairs for name, pairs in prepared.eval.items()}
    lines = [
        f"{key}: {line}"
        for key, pairs in ({"data.train": prepared.train} | sets).items()
        for line in note_lines(pairs.unread_columns, pairs.notes)
    ]
    lines += repeat_lines(prepared.train, prepared.eval)
    if is_small(spec, parts.config):
        lines += rehearse(spec, prepared)
    else:
        loads = "orchestrator debug --dry-run loads them and runs a trial step"
        lines.append(f"the weights were not loaded: {loads}")
    return Outlook(counts, prepared.train.pairs_per_epoch, notes=tuple(lines))


def _check_large_data(spec: RunSpec, parts: Parts) -> Iterator[str]:
    """Check all rows without the tokenizer and the first ones with it.

    Yields notes on rows and on skipped checks.

    Raises:
        UserError: the run would raise it, too.
    """
    with suppress(NoPairs):  # later rows may have usable pairs
        tokenize(spec, parts, first=FIRST_ROWS)
    evaluated = (check_rows(spec.data, "eval", name) for name in spec.data.eval)
    for sources in (check_rows(spec.data, "train"), *evaluated):
        for each in sources:
            yield from (f"{each.key}: {line}" for line in note_lines(each.unread, each.notes))
    yield f"the first {FIRST_ROWS} rows of each source were tokenised; the run tokenises all"
