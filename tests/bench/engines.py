"""Print two tables: the memory each engine holds per rank between steps, and its step time beside
DDP's.

The model is a Qwen2 of 6 layers, hidden 256 and a vocabulary of 8192 (random weights, fp32), AdamW,
real gloo ranks of this machine. Bytes are counted in the tensors themselves. Times are of engines
that take turns in one set of processes: they say what an engine costs on a CPU over gloo, not what
it saves on GPUs.

    python tests/bench/engines.py [--rounds 5]
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from orchestrator.world import World
from support.engine_cases import bytes_held
from support.engine_runs import ENGINES, Case, engine_of, take_step
from support.gloo_ranks import on_gloo

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "initializer_range": 0.02,
}
CASE = Case(pairs=4, model=MODEL)


def held(world: World) -> dict[str, tuple[int, int]]:
    """Bytes of optimizer state and of weights on this rank, by engine."""
    return bytes_held(world, CASE)


def timed(world: World, rounds: int) -> dict[str, list[float]]:
    """Seconds of each engine's steps, in turns."""
    engines = {name: engine_of(replace(CASE, engine=name), world) for name in ENGINES}
    values: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            began = time.monotonic()
            take_step(engine, CASE, turn, world)
            if turn:  # the first one sets up
                values[name].append(time.monotonic() - began)
    return values


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    sizes = (1, 2, 4)
    by_size = {size: on_gloo(size, held) for size in sizes}
    print("optimizer state + weights, MB on the rank that holds most")
    print(f"{'engine':8}" + "".join(f"{f'N = {size}':>16}" for size in sizes))
    for name in ENGINES:
        cells = [
            [max(rank[name][i] for rank in by_size[size]) / 1e6 for i in (0, 1)] for size in sizes
        ]
        print(
            f"{name:8}"
            + "".join(f"{f'{state:.1f} + {weights:.1f}':>16}" for state, weights in cells)
        )
    seconds = {
        name: statistics.median(times) for name, times in on_gloo(2, timed, rounds)[0].items()
    }
    print(f"\nstep on 2 ranks, median of {rounds}")
    for name, median in seconds.items():
        print(f"{name:8}{median:8.3f} s{median / seconds['ddp']:8.2f} times ddp's")


if __name__ == "__main__":
    main()
