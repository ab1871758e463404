"""Measure the data order: seconds and memory by number of pairs, ranks and pairs a step, and how
evenly it deals.

    python tests/bench/order.py
    python tests/bench/order.py --pairs 300000,10000000 --ranks 8,512 --batch 512,8192 --json
    order.json

Lengths are log-normal, about 300 tokens each of prompt, chosen and rejected. `permutation` is paid
once an epoch by every rank; `plan` is one step as one rank computes it, which the loader does ahead
in its thread. `uneven` is the dearest rank's cost over the mean one, over the steps that were
planned: what the others wait.
"""

import argparse
import json
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.data.order import Integers, Order, PairCost, permutation

COST = PairCost(token=6_500_000_000, scored=545_000_000, seen=2 * 28 * 3584)  # of Qwen2.5-7B
STEPS = 5  # planned per setting


def lengths(pairs: int) -> Integers:
    """[N, 3] tokens."""
    return np.exp(np.random.default_rng(0).normal(5.5, 0.6, (pairs, 3))).astype(np.int64) + 1


def measured(token_lengths: Integers, ranks: int, batch: int) -> dict[str, Any]:
    """One setting: seconds of the permutation and of a plan, peak memory, evenness."""
    tracemalloc.start()
    began = time.perf_counter()
    permutation(len(token_lengths), 7, 0)
    permuted = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    orders = [
        Order(token_lengths, batch, rank, ranks, 7, 4, cost=COST) for rank in sorted({0, ranks - 1})
    ]
    orders[0].plan(0)  # the permutation is cached from here on
    seconds: list[float] = []
    uneven: list[float] = []
    for step in range(STEPS):
        began = time.perf_counter()
        plan = orders[0].plan(step * batch)
        seconds.append(time.perf_counter() - began)
        uneven.append(_uneven(orders[0], plan.global_pairs))
        counts = {len(order.plan(step * batch).micro_batches) for order in orders}
        assert len(counts) == 1, "ranks disagree on the number of micro-steps"
    return {
        "pairs": len(token_lengths),
        "ranks": ranks,
        "batch": batch,
        "permutation_s": permuted,
        "permutation_peak_mb": peak / 2**20,
        "plan_ms": 1000 * statistics.median(seconds),
        "uneven": max(uneven),
    }


def _uneven(order: Order, batch: Integers) -> float:
    from orchestrator.data.order import deal

    costs = order.costs[batch]
    loads = np.bincount(
        deal(costs[None], order.world_size)[0], weights=costs, minlength=order.world_size
    )
    return float(loads.max() / loads.mean())


def main() -> None:
    """Every combination of the three, as a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default="10000,300000,3000000")
    parser.add_argument("--ranks", default="1,8,64,512")
    parser.add_argument(
        "--batch",
        default="64,1024",
        help="pairs of a global batch; those under 2 a rank are left out",
    )
    parser.add_argument("--json", help="write what was found here")
    args = parser.parse_args()
    values: list[dict[str, Any]] = []
    print(
        f"{'pairs':>10}{'ranks':>7}{'batch':>7}{'permutation s':>15}"
        f"{'peak MB':>9}{'plan ms':>9}{'uneven':>8}"
    )
    for pairs in map(int, args.pairs.split(",")):
        token_lengths = lengths(pairs)
        for ranks in map(int, args.ranks.split(",")):
            for batch in (size for size in map(int, args.batch.split(",")) if size >= 2 * ranks):
                row = measured(token_lengths, ranks, batch)
                values.append(row)
                print(
                    f"{row['pairs']:10}{row['ranks']:7}{row['batch']:7}{row['permutation_s']:15.3f}"
                    f"{row['permutation_peak_mb']:9.0f}{row['plan_ms']:9.2f}{row['uneven']:8.3f}",
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
