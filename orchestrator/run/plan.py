"""Plan a run without starting it: run the checks that need no cluster, and compute its length."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestrator.data.order import Share, run_length
from orchestrator.data.shapes import note_lines
from orchestrator.data.sources import check_rows, check_source, count_rows
from orchestrator.run.checks.hub import unreachable_models, unread_sources
from orchestrator.settings.load import DATA_KEYS, check_model_names, paths_in
from orchestrator.settings.notes import Known, notes
from orchestrator.settings.spec import RunSpec

if TYPE_CHECKING:
    from orchestrator.training.prepare import Parts


SMALL_ROWS = 2048  # total rows up to which all are tokenised, and a small model runs a trial step
ELSEWHERE = ("RAY_ADDRESS", "SLURM_JOB_ID")  # set if a cluster or a batch job has the devices
FIRST_ROWS = 256  # rows of each source to tokenise if there are more


class _Outlook(NamedTuple):
    """Facts that the checks of a run have established."""

    counts: dict[
        str, int | None
    ]  # rows by the setting of a source; None if the source must be loaded to know
    per_epoch: int | None = None  # pairs, if all rows were tokenised
    positions: int | None = None  # of the model
    gpus: int | None = None  # of this machine
    notes: tuple[str, ...] = ()  # about the data, and about checks that were skipped


def planned(spec: RunSpec, starts_here: bool = True) -> dict[str, Any]:
    """Run the checks of a run's start, and return facts about the run by name.

    starts_here: False if other machines train, whose devices are unknown.

    "notes" lists unusual settings and skipped checks. Other facts are None if data must be loaded
    to know them.

    Raises:
        UserError: an error that the run would raise before its first step.
    """
    check_model_names(spec)  # before anything heavy is imported
    for key, source in paths_in(spec, DATA_KEYS).items():
        check_source(key, source)
    return _facts(spec, _checked(spec, starts_here and not _asks_for_other_devices(spec)))


def counted(spec: RunSpec) -> dict[str, Any]:
    """Return facts about a run that starts elsewhere; only its data are checked.

    Raises:
        UserError: a data file is missing or unreadable.
    """
    return _facts(spec, _Outlook(_counts(spec)))


def _counts(spec: RunSpec) -> dict[str, int | None]:
    splits = DATA_KEYS.values()
    return {
        key: count_rows(key, each, split)
        for split in splits
        for key, each in spec.data.sources(split).items()
    }


def _asks_for_other_devices(spec: RunSpec) -> bool:
    """Return whether the run trains on devices that this process does not see: on GPUs, in a
    cluster or in a job.
    """
    return bool(spec.cluster.resources.get("GPU")) or any(name in os.environ for name in ELSEWHERE)


def _checked(spec: RunSpec, on_this_device: bool) -> _Outlook:
    """Run the checks of a run's start, in the same order and with a temporary cache.

    Raises:
        UserError: the first failed check.
    """
    import torch

    from orchestrator.run.local.rehearsal import scratch_cache
    from orchestrator.training.prepare import check_code, check_device, load_parts

    check_code(spec)
    gpus = torch.cuda.device_count()
    if on_this_device:
        check_device(spec, torch.device("cuda" if gpus else "cpu"))
    if names := unreachable_models(spec):
        why = "is not checked; it is not cached here, and the hub does not answer"
        notes = tuple(f"{key} = {name}: {why}" for key, name in names.items())
        return _Outlook(_counts(spec), gpus=gpus, notes=notes)
    names = unread_sources(spec)
    unread = tuple(
        f"{key} = {name}: its rows are checked where the run starts" for key, name in names.items()
    )
    if unread and spec.model.init is not None:  # the tokenizer of model.init is trained on the rows
        return _Outlook(_counts(spec), gpus=gpus, notes=unread)
    with scratch_cache(spec) as scratch:
        parts = load_parts(scratch)
        positions = getattr(parts.config.get_text_config(), "max_position_embeddings", None)
        outlook = _Outlook(_counts(spec), notes=unread) if unread else _tokenized(scratch, parts)
        return outlook._replace(positions=positions, gpus=gpus)


def _tokenized(spec: RunSpec, parts: "Parts") -> _Outlook:
    """Tokenise all rows or the first ones, and run a trial step if data and models are small.

    Raises:
        UserError: the run would raise it, too.
    """
    from orchestrator.data.repeats import repeat_lines
    from orchestrator.run.local.rehearsal import is_small, rehearse
    from orchestrator.training.prepare import tokenize

    counts = _counts(spec)
    if (rows := _total(counts.values())) is None or rows > SMALL_ROWS:
        return _Outlook(counts, notes=tuple(_large_data(spec, parts)))
    prepared = tokenize(spec, parts)
    sets = {"data.train": prepared.train} | {
        spec.data.eval_key(name): each for name, each in prepared.eval.items()
    }
    lines = [
        f"{key}: {line}"
        for key, pairs in sets.items()
        for line in note_lines(pairs.unread_columns, pairs.notes)
    ]
    lines += repeat_lines(prepared.train, prepared.eval)
    if is_small(spec, parts.config):
        lines += rehearse(spec, prepared)
    else:
        lines.append(
            "the weights were not loaded: orchestrator debug --dry-run loads them and runs a "
            "trial step"
        )
    return _Outlook(counts, prepared.train.pairs_per_epoch, notes=tuple(lines))


def _large_data(spec: RunSpec, parts: "Parts") -> Iterator[str]:
    """Check all rows without the tokenizer and the first ones with it; yield notes on rows and on
    skipped checks.

    Raises:
        UserError: the run would raise it, too.
    """
    from orchestrator.data.pairs import NoPairs
    from orchestrator.training.prepare import tokenize

    with suppress(NoPairs):  # later rows may have usable pairs
        tokenize(spec, parts, first=FIRST_ROWS)
    for rows in (
        check_rows(spec.data, "train"),
        *(check_rows(spec.data, "eval", name) for name in spec.data.eval),
    ):
        for each in rows:
            yield from (f"{each.key}: {line}" for line in note_lines(each.unread, each.notes))
    yield f"the first {FIRST_ROWS} rows of each source were tokenised; the run tokenises all"


def _facts(spec: RunSpec, outlook: _Outlook) -> dict[str, Any]:
    batch, ranks = spec.batch, spec.cluster.num_workers
    each = ranks if isinstance(ranks, list) else [ranks]  # the fewest and the most
    by_ranks: dict[str, list[Any]] = {
        "pairs_per_rank": [batch.pairs_per_rank(count) for count in each]
    }
    if batch.micro_batch_size:
        by_ranks["grad_accum"] = [batch.grad_accum(count) for count in each]
    sets, counts = _training_sets(spec, outlook.counts), outlook.counts
    train_rows, per_epoch = (
        _total(each[name] for each in sets) for name in ("rows", "rows_per_epoch")
    )
    facts: dict[str, Any] = {
        "run_dir": str(spec.run_dir),
        "train_rows": train_rows,
        "eval_rows": _eval_rows(spec, counts, train_rows),
        "ranks": ranks,
        "global_batch_size": batch.global_batch_size,
    }
    for name in ("micro_batch_size", "max_tokens_per_microbatch"):
        if (size := getattr(batch, name)) is not None:
            facts[name] = size
    facts |= {
        name: values if isinstance(ranks, list) else values[0] for name, values in by_ranks.items()
    }
    if len(sets) > 1 or train_rows != per_epoch:
        facts |= {"train_sets": sets, "rows_per_epoch": per_epoch}
    if outlook.per_epoch not in (None, per_epoch):
        per_epoch = facts["pairs_per_epoch"] = outlook.per_epoch
    length = _length(spec, per_epoch) if per_epoch else {}
    known = Known(
        length.get("steps"), per_epoch, length.get("epochs"), outlook.positions, outlook.gpus
    )
    return facts | length | {"notes": [*notes(spec, known), *outlook.notes]}


def _length(spec: RunSpec, per_epoch: int) -> dict[str, Any]:
    """Return the length of a run with so many pairs per epoch, and the numbers of evaluations and
    checkpoints.
    """
    batch, evaluation = spec.batch, spec.evaluation
    length = run_length(per_epoch, batch.global_batch_size, spec.training)
    steps_per_epoch = -(-per_epoch // batch.global_batch_size)
    epoch = steps_per_epoch if evaluation.every_epoch else None
    evaluations = _times(length.steps, evaluation.every_steps, epoch) + evaluation.at_start
    return {
        "steps_per_epoch": steps_per_epoch,
        "last_batch_of_epoch": per_epoch % batch.global_batch_size or batch.global_batch_size,
        "epochs": round(length.epochs, 4),
        "steps": length.steps,
        "warmup_steps": spec.scheduler.warmup(length.steps),
        "evaluations": evaluations if spec.data.eval_sets else 0,
        "checkpoints": _times(length.steps, spec.checkpoint.every_steps),
    }


def _training_sets(spec: RunSpec, counts: dict[str, int | None]) -> list[dict[str, Any]]:
    """Return for each training set: its rows, without those held out, and rows per epoch.

    counts: rows by setting.
    """
    sets: list[dict[str, Any]] = []
    for key, source in zip(spec.data.sources("train"), spec.data.train, strict=True):
        if (rows := counts[key]) is not None:
            rows -= round(rows * (spec.data.eval_fraction or 0))
        taken = None if rows is None else Share.of(rows, source.weight).per_epoch
        sets.append(
            {"source": source.path, "rows": rows, "weight": source.weight, "rows_per_epoch": taken}
        )
    return sets


def _eval_rows(spec: RunSpec, counts: dict[str, int | None], train_rows: int | None) -> Any:
    """Return the number of evaluated rows, by name for several sets."""
    if spec.data.eval_fraction is not None:
        rows = _total(counts.values())
        return None if rows is None or train_rows is None else rows - train_rows
    by_name = {
        name: counts[key]
        for name, key in zip(spec.data.eval, spec.data.sources("eval"), strict=True)
    }
    return by_name.get("", by_name or 0)


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum of counts; None if one is unknown."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def _times(steps: int, *every: int | None) -> int:
    """Return how often an event happens that follows every `every` steps and the last step."""
    return len({steps}.union(*(range(each, steps + 1, each) for each in every if each)))
