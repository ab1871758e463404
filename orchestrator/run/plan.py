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
    rows = count_rows("data.train", spec.data.train)
    facts: dict[str, Any] = {
        "run_dir": str(spec.run_dir),
        "train_rows": rows,
        "eval_rows": count_rows("data.eval", spec.data.eval) if spec.data.eval else 0,
        "ranks": ranks,
        "global_batch_size": batch.global_batch_size,
        "pairs_per_rank": -(-batch.global_batch_size // ranks),
    }
    if batch.micro_batch_size:
        facts["micro_batch_size"] = batch.micro_batch_size
        facts["grad_accum"] = -(-facts["pairs_per_rank"] // batch.micro_batch_size)
    else:
        facts["max_tokens_per_microbatch"] = batch.max_tokens_per_microbatch
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
