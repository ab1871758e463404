"""Compute the length of a run and other facts about it from its settings and its rows."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from orchestrator.data.order import Share, run_length
from orchestrator.data.sources import check_source, count_rows
from orchestrator.settings.counts import counted
from orchestrator.settings.load import DATA_KEYS, check_model_names, paths_in
from orchestrator.settings.notes import Known, notes
from orchestrator.settings.run import RunSpec
from orchestrator.training.save_interval import explained, hours_between_failures

EXAMPLE_COSTS_S = (1.0, 30.0)  # of a save, for the arithmetic of checkpoint.every=auto


class Outlook(NamedTuple):
    """Facts that the checks of a run have established."""

    # rows by the setting of a source; None if the source must be loaded to know
    counts: dict[str, int | None]
    per_epoch: int | None = None  # pairs, if all rows were tokenised
    positions: int | None = None  # of the model
    gpus: int | None = None  # of this machine
    notes: tuple[str, ...] = ()  # about the data, and about checks that were skipped


def check_names(spec: RunSpec) -> None:
    """Check the names of models and data, which needs no heavy library.

    Raises:
        UserError: a name is wrong.
    """
    check_model_names(spec)
    for key, source in paths_in(spec, DATA_KEYS).items():
        check_source(key, source)


def row_counts(spec: RunSpec) -> dict[str, int | None]:
    """Return the rows by the setting of a source; None if the source must be loaded to know.

    Raises:
        UserError: a data file is missing or unreadable.
    """
    return {
        key: count_rows(key, each, split)
        for split in DATA_KEYS.values()
        for key, each in spec.data.sources(split).items()
    }


def run_facts(spec: RunSpec, outlook: Outlook) -> dict[str, Any]:
    """Return facts about a run by name; "notes" lists unusual settings and the notes of outlook."""
    sets = _training_sets(spec, outlook.counts)
    train_rows = total(each["rows"] for each in sets)
    per_epoch = total(each["rows_per_epoch"] for each in sets)
    facts: dict[str, Any] = {
        "run_dir": str(spec.run_dir),
        "train_rows": train_rows,
        "eval_rows": _eval_rows(spec, outlook.counts, train_rows),
    }
    facts |= _batches(spec)
    if len(sets) > 1 or train_rows != per_epoch:
        facts |= {"train_sets": sets, "rows_per_epoch": per_epoch}
    if outlook.per_epoch not in (None, per_epoch):
        per_epoch = facts["pairs_per_epoch"] = outlook.per_epoch
    length = _length_facts(spec, per_epoch) if per_epoch else {}
    known = Known(
        length.get("steps"), per_epoch, length.get("epochs"), outlook.positions, outlook.gpus
    )
    length |= _checkpoint_interval(spec)
    return facts | length | {"notes": [*notes(spec, known), *outlook.notes]}


def _batches(spec: RunSpec) -> dict[str, Any]:
    """Return the ranks and sizes of batches; for an elastic run with the fewest and the most."""
    batch, ranks = spec.batch, spec.cluster.num_workers
    facts: dict[str, Any] = {"ranks": ranks, "global_batch_size": batch.global_batch_size}
    for name in ("micro_batch_size", "max_tokens_per_microbatch"):
        if (size := getattr(batch, name)) is not None:
            facts[name] = size
    ends = ranks if isinstance(ranks, list) else [ranks]
    by_ranks: dict[str, list[Any]] = {
        "pairs_per_rank": [batch.pairs_per_rank(count) for count in ends]
    }
    if batch.micro_batch_size:
        by_ranks["grad_accum"] = [batch.grad_accum(count) for count in ends]
    is_elastic = isinstance(ranks, list)
    return facts | {name: each if is_elastic else each[0] for name, each in by_ranks.items()}


def _length_facts(spec: RunSpec, per_epoch: int) -> dict[str, Any]:
    """Return the length of a run with so many pairs per epoch.

    It includes the numbers of evaluations and checkpoints.
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
        "checkpoints": spec.checkpoint.every or _times(length.steps, spec.checkpoint.every_steps),
    }


def _checkpoint_interval(spec: RunSpec) -> dict[str, Any]:
    """Return how checkpoint.every=auto chooses the interval."""
    if spec.checkpoint.every is None:
        return {}
    per_node = spec.slurm.workers_per_node or spec.cluster.max_workers
    nodes = -(-spec.cluster.max_workers // per_node)
    hours = hours_between_failures(spec.cluster.mtbf_hours, nodes)
    assumed = f"one failure per node in {spec.cluster.mtbf_hours:g} h (cluster.mtbf_hours)"
    examples = "; ".join(explained(cost, hours) for cost in EXAMPLE_COSTS_S)
    first = "the first save follows step 1 and is timed"
    text = f"{first}; assumed: {assumed}, {counted(nodes, 'node')}; for example {examples}"
    return {"checkpoint_interval": text}


def _training_sets(spec: RunSpec, counts: dict[str, int | None]) -> list[dict[str, Any]]:
    """Return for each training set: its rows, without those held out, and rows per epoch.

    counts: rows by setting.
    """
    sets: list[dict[str, Any]] = []
    for key, source in zip(spec.data.sources("train"), spec.data.train, strict=True):
        if (rows := counts[key]) is not None:
            rows -= round(rows * (spec.data.eval_fraction or 0))
        per_epoch = None if rows is None else Share.of(rows, source.weight).per_epoch
        weight = {"weight": source.weight, "rows_per_epoch": per_epoch}
        sets.append({"source": source.path, "rows": rows, **weight})
    return sets


def _eval_rows(spec: RunSpec, counts: dict[str, int | None], train_rows: int | None) -> Any:
    """Return the number of evaluated rows, by name for several sets."""
    if spec.data.eval_fraction is not None:
        rows = total(counts.values())
        return None if rows is None or train_rows is None else rows - train_rows
    keys = zip(spec.data.eval, spec.data.sources("eval"), strict=True)
    by_name = {name: counts[key] for name, key in keys}
    return by_name.get("", by_name or 0)


def total(counts: Iterable[int | None]) -> int | None:
    """Return the sum of counts; None if one is unknown."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def _times(steps: int, *every: int | None) -> int:
    """Return how often an event happens that follows every `every` steps and the last step."""
    return len({steps}.union(*(range(each, steps + 1, each) for each in every if each)))
