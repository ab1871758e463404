"""What a run would be, from its settings and data files alone: the rules checked and the batch arithmetic done."""

from typing import Any

from orchestrator.data.order import run_length
from orchestrator.data.pairs import check_source, count_rows
from orchestrator.settings.spec import RunSpec


def planned(spec: RunSpec) -> dict[str, Any]:
    """Facts of the run by name. Rows are counted before any is dropped; None where only loading would tell.

    Raises:
        UserError: a data file is missing or unreadable.
    """
    check_source("data.train", spec.data.train)
    if spec.data.eval:
        check_source("data.eval", spec.data.eval)
    batch, ranks = spec.batch, spec.cluster.num_workers
    each = ranks if isinstance(ranks, list) else [ranks]  # the fewest and the most
    by_ranks: dict[str, list[Any]] = {"pairs_per_rank": [batch.pairs_per_rank(count) for count in each]}
    if batch.micro_batch_size:
        by_ranks["grad_accum"] = [batch.grad_accum(count) for count in each]
    rows = count_rows("data.train", spec.data.train)
    facts: dict[str, Any] = {
        "run_dir": str(spec.run_dir),
        "train_rows": rows,
        "eval_rows": count_rows("data.eval", spec.data.eval) if spec.data.eval else 0,
        "ranks": ranks,
        "global_batch_size": batch.global_batch_size,
    }
    for name in ("micro_batch_size", "max_tokens_per_microbatch"):
        if (size := getattr(batch, name)) is not None:
            facts[name] = size
    facts |= {name: values if isinstance(ranks, list) else values[0] for name, values in by_ranks.items()}
    if rows:
        length = run_length(rows, batch.global_batch_size, spec.training)
        facts |= {
            "steps_per_epoch": -(-rows // batch.global_batch_size),
            "last_batch_of_epoch": rows % batch.global_batch_size or batch.global_batch_size,
            "epochs": round(length.epochs, 4),
            "steps": length.steps,
            "warmup_steps": spec.scheduler.warmup(length.steps),
        }
        for name, every in (("evaluations", spec.evaluation.every_steps), ("checkpoints", spec.checkpoint.every_steps)):
            facts[name] = _times(length.steps, every) + (name == "evaluations")  # one more before the first step
        facts["evaluations"] *= bool(spec.data.eval)
    return facts


def _times(steps: int, every: int | None) -> int:
    """How often something happens that happens every so many steps and after the last."""
    return -(-steps // every) if every else 1
