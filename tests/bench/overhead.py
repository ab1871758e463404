"""Measure what the whole program costs over a bare loop around the same step, without start-up and
end.

    python tests/bench/overhead.py
    python tests/bench/overhead.py --data pairs.jsonl --steps 40 --json overhead.json
    python tests/bench/overhead.py --ledger    # what the pair ledger costs: the program without it
                                               instead of the loop
    python tests/bench/overhead.py --watchdog  # what beats and the watchdog's thread cost

Program: Trainer.fit with the console and JSONL callbacks, metrics, agreement of ranks, reference
cache, prefetching loader, W&B off. Bare: collate, micro-steps, clip, optimizer step, schedule,
nothing else, over the same global batches with the same engine, the reference known to both. They
take turns within one process, `rounds` times, on CPU seconds.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.data.collate import Counts
from orchestrator.settings.load import make_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training import assemble, worker
from orchestrator.training.result import FitResult
from orchestrator.training.rundir import RunDir
from orchestrator.training.seen_pairs import SeenPairs
from orchestrator.training.session import LocalSession
from orchestrator.training.trainer import Trainer
from orchestrator.training.watchdog import Watchdog, at_prompt, watched
from orchestrator.world import World

MODEL = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "max_position_embeddings": 4096,
}


class Clock(TrainerCallback):
    """CPU seconds from the first step to the end of the last one of a turn."""

    began = took = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        Clock.began = Clock.began or time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        Clock.took = time.process_time() - Clock.began


class Alternating(Trainer):
    """Takes its own steps and a bare loop's in turns, as long as there are any."""

    turns: list[tuple[float, float]] = []
    steps_per_turn = 0
    part = ""  # of the program, that a turn is without

    def fit(self) -> FitResult:
        """Never saved nor resumed: this run is a measurement."""
        self.callbacks.fire("on_train_begin")
        self.start_tolerance = (
            None  # the bare loop moves the policy before the first step is counted
        )
        last = self.length.steps
        bare_loop(self, 2)  # warm both
        self.checkpointer.seen = None if self.part else self.checkpointer.seen
        while self.progress.step < last:
            bare = self.turn() if self.part else bare_loop(self, self.steps_per_turn)
            with self.with_part():
                Alternating.turns.append((bare, self.turn()))
        raise SystemExit(0)

    @contextlib.contextmanager
    def with_part(self) -> Iterator[None]:
        """Take steps with the part that is measured."""
        session = self.context.session
        assert isinstance(session, LocalSession)
        if self.part == "ledger":
            self.checkpointer.seen = SeenPairs(self.context.spec.dpo)
            yield
            self.checkpointer.seen = None
        elif self.part == "watchdog":
            dog = Watchdog(session.run_dir, self.context.world, self.context.spec, print)
            with watched(dog):
                session.watchdog = dog
                yield
            session.watchdog = None
        else:
            yield

    def turn(self) -> float:
        """CPU seconds of so many steps of its own."""
        Clock.began = 0.0
        last = self.progress.step + self.steps_per_turn
        self.length = self.length._replace(steps=last)
        with contextlib.closing(self.steps()) as steps:
            self.train(steps)
        return Clock.took


def bare_loop(trainer: Trainer, steps: int) -> float:
    """CPU seconds of so many steps from the trainer's position on; the position stays."""
    engine, loader, seen = trainer.engine, trainer.loaders.train, trainer.progress.pairs_seen
    assert loader.cache is not None
    began = time.process_time()
    for _ in range(steps):
        plan = loader.order.plan(seen)
        seen += len(plan.global_pairs)
        counts = Counts(len(plan.global_pairs), 1)
        for number, micro in enumerate(plan.micro_batches):
            batch = loader.collator([loader.pairs[int(index)] for index in micro.pairs])
            batch = batch._replace(ref_logps=loader.cache.known(micro.pairs))
            engine.micro_step(batch, counts, last=number == len(plan.micro_batches) - 1)
        engine.grads_finite().item()
        engine.optimizer_step(apply=True)
    return time.process_time() - began


def main() -> None:
    """One run whose trainer measures both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        help="a file of preference pairs; pairs of about 500 tokens are made up if not given",
    )
    parser.add_argument("--steps", type=int, default=10, help="of one turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--ledger", action="store_true", help="measure the pair ledger alone")
    parser.add_argument("--watchdog", action="store_true", help="measure the watchdog alone")
    parser.add_argument("--json", help="write what was found here")
    args = parser.parse_args()
    part = "ledger" if args.ledger else "watchdog" if args.watchdog else ""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(args.data) if args.data else _made_up(Path(folder))
        spec = make_spec(
            {
                "run": {"dir": folder, "name": "overhead"},
                "model": {"init": {"model_type": "qwen2", "vocab_size": 4096, "config": MODEL}},
                "data": {"train": str(data)},
                "batch": {"global_batch_size": args.batch, "micro_batch_size": args.batch},
                "training": {"max_steps": args.steps * args.rounds * (2 if part else 1)},
                "reference": {"cache": "full"},
                "callbacks": [f"{__name__}:Clock"],
                "precision": "fp32",
                "wandb": {"mode": "disabled"},
            }
        )
        Alternating.steps_per_turn, Alternating.part = args.steps, part
        assemble.Trainer = Alternating
        with contextlib.suppress(SystemExit):  # how Alternating ends
            worker.run(
                spec, World(0, 1, 0, torch.device("cpu")), LocalSession(RunDir(spec.run_dir), 0)
            )
    ratios = [program / bare - 1 for bare, program in Alternating.turns]
    what = f"the {part or 'program'}"
    each = [bare / args.steps for bare, _ in Alternating.turns]
    print(
        f"a step without {statistics.median(each):.3f} CPU s; {what} adds "
        f"{statistics.median(ratios):+.2%} ({min(ratios):+.2%}..{max(ratios):+.2%} over "
        f"{len(ratios)} turns of {args.steps} steps)"
    )
    if args.watchdog:
        print(_of_beats(spec, statistics.median(each)))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "turns": Alternating.turns}, indent=1) + "\n"
        )


def _of_beats(spec: RunSpec, step_s: float) -> str:
    """Return what the beats of a step and the watchdog's thread take, each measured alone."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        run_dir.logs.mkdir()
        dog = Watchdog(run_dir, World(0, 1, 0, torch.device("cpu")), spec, print)

        def seconds(call: Callable[[], object], times: int) -> float:
            began = time.process_time()
            for _ in range(times):
                call()
            return (time.process_time() - began) / times

        beat_s = seconds(lambda: dog.beat(1, "forward", 1), 100_000)
        tick_s = seconds(lambda: (at_prompt(), dog._publish(1.0), run_dir.hang.exists()), 1_000)
    # collate, reduce, forward, backward, reduce, update, callbacks; a tick every second
    whole_s = 7 * beat_s + step_s * tick_s
    return (
        f"alone: 7 beats of {beat_s * 1e6:.1f} us in a step and a tick of {tick_s * 1e6:.0f} us in "
        f"a second are {whole_s / step_s:.4%} of a step"
    )


def _made_up(folder: Path) -> Path:
    import random

    draw = random.Random(0)
    path = folder / "pairs.jsonl"

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(count))

    with path.open("w") as file:
        for _ in range(200):
            file.write(
                json.dumps({"prompt": words(60), "chosen": words(50), "rejected": words(50)}) + "\n"
            )
    return path


if __name__ == "__main__":
    main()
