"""What a run would be, from its settings and data files alone: the rules checked and the batch arithmetic done."""

from collections.abc import Iterable
from typing import Any

from orchestrator.data.order import Share, run_length
from orchestrator.data.sources import check_source, count_rows
from orchestrator.settings.load import DATA_KEYS, paths_in
from orchestrator.settings.spec import RunSpec


def planned(spec: RunSpec) -> dict[str, Any]:
    """Facts of the run by name. Rows are counted before any is dropped, and for data.eval_fraction as if each had a
    prompt of its own; None where only loading would tell.

    Raises:
        UserError: a data file is missing or unreadable.
    """
    sources = paths_in(spec, DATA_KEYS)
    for key, source in sources.items():
        check_source(key, source)
    batch, ranks = spec.batch, spec.cluster.num_workers
    each = ranks if isinstance(ranks, list) else [ranks]  # the fewest and the most
    by_ranks: dict[str, list[Any]] = {"pairs_per_rank": [batch.pairs_per_rank(count) for count in each]}
    if batch.micro_batch_size:
        by_ranks["grad_accum"] = [batch.grad_accum(count) for count in each]
    counts = {
        key: count_rows(key, source, split)
        for split in DATA_KEYS.values()
        for key, source in spec.data.sources(split).items()
    }
    sets = _training_sets(spec, counts)
    train_rows, per_epoch = (_total(each[name] for each in sets) for name in ("rows", "rows_per_epoch"))
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
    facts |= {name: values if isinstance(ranks, list) else values[0] for name, values in by_ranks.items()}
    if len(sets) > 1 or train_rows != per_epoch:
        facts |= {"train_sets": sets, "rows_per_epoch": per_epoch}
    if per_epoch:
        length = run_length(per_epoch, batch.global_batch_size, spec.training)
        facts |= {
            "steps_per_epoch": -(-per_epoch // batch.global_batch_size),
            "last_batch_of_epoch": per_epoch % batch.global_batch_size or batch.global_batch_size,
            "epochs": round(length.epochs, 4),
            "steps": length.steps,
            "warmup_steps": spec.scheduler.warmup(length.steps),
        }
        wanted, epoch = spec.evaluation, facts["steps_per_epoch"] if spec.evaluation.every_epoch else None
        evaluations = _times(length.steps, wanted.every_steps, epoch) + wanted.at_start
        facts["evaluations"] = evaluations if spec.data.eval_sets else 0
        facts["checkpoints"] = _times(length.steps, spec.checkpoint.every_steps)
    return facts


def _training_sets(spec: RunSpec, counts: dict[str, int | None]) -> list[dict[str, Any]]:
    """Each training set: its rows, without those held out, and how many of them an epoch takes. counts: rows by the
    setting of a source."""
    sets: list[dict[str, Any]] = []
    for key, source in zip(spec.data.sources("train"), spec.data.train, strict=True):
        if (rows := counts[key]) is not None:
            rows -= round(rows * (spec.data.eval_fraction or 0))
        taken = None if rows is None else Share.of(rows, source.weight).per_epoch
        sets.append({"source": source.path, "rows": rows, "weight": source.weight, "rows_per_epoch": taken})
    return sets


def _eval_rows(spec: RunSpec, counts: dict[str, int | None], train_rows: int | None) -> Any:
    """Rows that are evaluated; of several sets by their names."""
    if spec.data.eval_fraction is not None:
        rows = _total(counts.values())
        return None if rows is None or train_rows is None else rows - train_rows
    by_name = {name: counts[key] for name, key in zip(spec.data.eval, spec.data.sources("eval"), strict=True)}
    return by_name.get("", by_name or 0)


def _total(counts: Iterable[int | None]) -> int | None:
    """Their sum, where all are known."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def _times(steps: int, *every: int | None) -> int:
    """How often something happens that happens after so many steps each and after the last."""
    return len({steps}.union(*(range(each, steps + 1, each) for each in every if each)))
