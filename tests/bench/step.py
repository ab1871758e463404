"""Our step against TRL's on the same pairs and the same weights, side by side: seconds a pair,
memory, the ceiling.

    python tests/bench/step.py --data pairs.jsonl --pairs 48
    python tests/bench/step.py --data synthetic:4 --pairs 48 --against trl-best --json step.json
    python tests/bench/step.py --data synthetic:1 --pairs 64 --size 0.5b --precision bf16      (on a
                                                                                               GPU)

A step is forward and backward over --batch pairs, collation included; the optimizer, the same for
all, is left out. Contenders take turns batch by batch. Seconds are CPU seconds of this process
(--threads 1), or seconds of the device. Memory is measured in a process of its own for each, as the
peak over what is allocated once the models are there.

    ours-cached   packed pairs, one forward over the prompt, loss in the head, reference log-probs
                  known
    ours-live     the same, the reference computed with the policy
    trl-default   TRL's defaults: gradient checkpointing, padded micro-batches of --trl-micro pairs,
                  live reference
    trl-live      no gradient checkpointing, one pair at a time (least padding), live reference
    trl-best      no gradient checkpointing, one pair at a time, precomputed reference: TRL's best
                  exact setting found
"""

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from orchestrator.data.collate import Counts, PackedCollator
from orchestrator.data.order import Order
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.dpo.step import PairStep
from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.optim import optimizer_factory, scheduler_factory
from orchestrator.engines.precision import autocast
from orchestrator.models.attention import choose_kernel, use_packed_attention
from orchestrator.models.policy import build_policy, load_tokenizer, pair_cost
from orchestrator.models.reference import Reference
from orchestrator.settings.load import make_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training.loaders import CPU_ROW
from orchestrator.world import World

Rows = list[dict[str, Any]]
Step = Callable[[list[int]], float]
"""Forward and backward over some pairs, by their place in the rows; returns their mean loss."""

# Shapes: "bench" is small enough for one core; the others are Qwen2.5-0.5B's, Qwen2.5-7B's and
# Llama-7B's.
SIZES: dict[str, dict[str, Any]] = {
    "bench": {
        "model_type": "qwen2",
        "vocab_size": 8192,
        "config": {
            "vocab_size": 8192,
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 704,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    },
    "0.5b": {
        "model_type": "qwen2",
        "vocab_size": 8192,
        "config": {
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "tie_word_embeddings": True,
        },
    },
    "7b": {
        "model_type": "qwen2",
        "vocab_size": 8192,
        "config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
        },
    },
    "llama-7b": {
        "model_type": "llama",
        "vocab_size": 8192,
        "config": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
        },
    },
}
LARGE = ("7b", "llama-7b")  # too large for each contender to have models of its own
OURS, TRL = ("ours-cached", "ours-live"), ("trl-default", "trl-live", "trl-best")
# of the mean loss of a batch; TRL's own fp32 sums are off by up to 1.4e-5
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16


class Bench(NamedTuple):
    """The inputs that every contender gets."""

    args: argparse.Namespace
    spec: RunSpec
    tokenizer: Any
    rows: Rows
    device: torch.device


# --- pairs and models -----------------------------------------------------------------------------


def prepared(args: argparse.Namespace, folder: Path) -> Bench:
    """Settings, tokenizer and pairs; a file is tokenised by our own code, synthetic pairs are
    random ids.
    """
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    synthetic = args.data.startswith("synthetic:")
    data = folder / "words.jsonl" if synthetic else Path(args.data)
    if synthetic:
        words = {"prompt": "a b c", "chosen": "d", "rejected": "e"}
        data.write_text(json.dumps(words) + "\n")
    spec = make_spec(
        {
            "run": {"dir": str(folder), "name": "bench", "seed": 0},
            "model": {"init": SIZES[args.size]},
            "data": {"train": str(data), "max_length": args.max_length},
            "batch": {"global_batch_size": args.batch, "micro_batch_size": args.batch},
            "training": {"gradient_checkpointing": args.gradient_checkpointing},
            "precision": args.precision,
        }
    )
    tokenizer = load_tokenizer(spec)
    if synthetic:
        rows = _synthetic(float(args.data.partition(":")[2]), args)
    else:
        pairs = tokenized_pairs(spec.data, "train", tokenizer, spec.cache_dir)
        chosen = random.Random(0).sample(range(len(pairs)), min(args.pairs, len(pairs)))
        rows = [pairs[index] for index in chosen]
    return Bench(args, spec, tokenizer, rows, device)


def _synthetic(ratio: float, args: argparse.Namespace) -> Rows:
    """Completions of about 160 tokens, log-normal; a prompt has `ratio` times the mean of its two
    completions. Pairs longer than --max-length are drawn again.
    """
    draw, vocabulary = random.Random(0), SIZES[args.size]["vocab_size"]

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    rows: Rows = []
    while len(rows) < args.pairs:
        chosen = max(16, int(draw.lognormvariate(5.0, 0.4)))
        rejected = max(16, int(chosen * draw.lognormvariate(0, 0.25)))
        prompt = max(1, int(ratio * (chosen + rejected) / 2))
        if prompt + max(chosen, rejected) > args.max_length:
            continue
        values = {
            "prompt_ids": ids(prompt),
            "chosen_ids": ids(chosen),
            "rejected_ids": ids(rejected),
        }
        rows.append({"pair_id": len(rows), **values})
    return rows


def models(bench: Bench) -> tuple[Any, Any]:
    """Policy and reference: random weights, a little apart, so that losses are not all ln 2. With
    bf16 the weights are fp32 under autocast, but for a large model, two of which would not fit one
    device so: all contenders' are bf16.
    """
    dtype = (
        torch.bfloat16
        if bench.args.precision == "bf16" and bench.args.size in LARGE
        else torch.float32
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        reference = build_policy(bench.spec, bench.tokenizer, dtype)
        policy = build_policy(bench.spec, bench.tokenizer, dtype)
    reference.gradient_checkpointing_disable()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return policy, reference


# --- contenders -----------------------------------------------------------------------------------


def ours(bench: Bench, policy: Any, reference: Reference, cached: bool) -> Step:
    """Our engine's micro-steps over the micro-batches that our order makes.

    cached: the log-probs are made now.
    """
    args, spec = bench.args, bench.spec
    world = World(0, 1, 0, bench.device)
    kernel = choose_kernel("auto", bench.device, args.precision)
    for model in (policy, reference.model):
        use_packed_attention(model, kernel)
    precision = "fp32" if policy.dtype == torch.bfloat16 else args.precision
    engine = DdpEngine(spec.engine, world, precision, 1.0, 0.0)
    pair_step = PairStep(policy, reference, spec.dpo)
    engine.wrap(pair_step, optimizer_factory(spec.optimizer), scheduler_factory(spec.scheduler, 1))
    lengths = np.array(
        [
            [len(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
            for row in bench.rows
        ]
    )
    limit = CPU_ROW if bench.device.type == "cpu" else None
    order = Order(lengths, args.batch, 0, 1, 0, args.batch, limit, cost=pair_cost(policy))
    collate = PackedCollator(spec.data)
    known: dict[int, torch.Tensor] = {}
    if cached:
        for index, row in enumerate(bench.rows):
            known[index] = engine.reference_logps(collate([row]).to(bench.device)).cpu()

    def step(pairs: list[int]) -> float:
        total = 0.0
        micro_batches = order.micro_batches(np.array(pairs))
        for number, micro in enumerate(micro_batches):
            batch = collate([bench.rows[index] for index in micro.pairs])
            if cached:
                ref_logps = torch.stack(
                    [known[int(index)] for index in micro.pairs], dim=1
                ).flatten()
                batch = batch._replace(ref_logps=ref_logps)
            last = number == len(micro_batches) - 1
            total += engine.micro_step(
                batch.to(bench.device), Counts(len(pairs), 1), last
            ).loss.item()
        return total

    return step


def trl_trainer(
    bench: Bench, policy: Any, reference: Any, micro: int, precompute: bool, peft_config: Any
) -> Any:
    """Build a DPOTrainer over the pairs' token ids, with transformers' own layers."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    args = bench.args
    for model in (policy, reference):
        # transformers' own norms and MLPs again
        for module in model.modules() if model is not None else ():
            module.__dict__.pop("forward", None)
    config = DPOConfig(
        output_dir=str(bench.spec.run_dir),
        per_device_train_batch_size=micro,
        gradient_checkpointing=False,  # switched before each step
        precompute_ref_log_probs=precompute,
        precompute_ref_batch_size=micro,
        bf16=args.precision == "bf16",
        use_cpu=bench.device.type == "cpu",
        max_length=args.max_length,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    prepare = DPOTrainer._prepare_dataset
    # the pairs are token ids already
    DPOTrainer._prepare_dataset = lambda self, dataset, *_, **__: dataset
    try:
        rows = Dataset.from_list(
            [{k: v for k, v in row.items() if k != "pair_id"} for row in bench.rows]
        )
        trainer = DPOTrainer(
            policy,
            reference,
            config,
            train_dataset=rows,
            processing_class=bench.tokenizer,
            peft_config=peft_config,
        )
    finally:
        DPOTrainer._prepare_dataset = prepare
    return trainer


def trl(
    bench: Bench,
    policy: Any,
    reference: Any,
    micro: int,
    precompute: bool = False,
    peft_config: Any = None,
) -> Step:
    """DPOTrainer's own collator and compute_loss, `micro` pairs at a time; no code of ours runs in
    it.
    """
    args = bench.args
    trainer = trl_trainer(bench, policy, reference, micro, precompute, peft_config)
    model: Any = trainer.model
    model.train()
    rows_of_trl = [trainer.train_dataset[index] for index in range(len(bench.rows))]

    def step(pairs: list[int]) -> float:
        total = 0.0
        for start in range(0, len(pairs), micro):
            chunk = pairs[start : start + micro]
            inputs = trainer._prepare_inputs(
                trainer.data_collator([rows_of_trl[index] for index in chunk])
            )
            with autocast(
                bench.device, "fp32" if policy.dtype == torch.bfloat16 else args.precision
            ):
                loss = trainer.compute_loss(model, inputs) * len(chunk) / len(pairs)
            loss.backward()
            total += loss.item()
        return total

    return step


def _trl_micro(bench: Bench, name: str) -> int:
    """Pairs of a padded micro-batch: one at a time wastes least, but not on a GPU."""
    alone = bench.device.type == "cpu" and name != "trl-default"
    return 1 if alone else min(bench.args.trl_micro, bench.args.batch)


def set_checkpointing(bench: Bench, name: str, policy: Any) -> None:
    """Contenders may share a policy: each is given its own way before its turn."""
    if name == "trl-default" or bench.args.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.disable_input_require_grads()
    else:
        policy.gradient_checkpointing_disable()


def contender(name: str, bench: Bench, policy: Any, reference: Any) -> Step:
    """The step of that name over these models."""
    if name in OURS:
        return ours(bench, policy, Reference(reference), cached=name == "ours-cached")
    return trl(bench, policy, reference, _trl_micro(bench, name), precompute=name == "trl-best")


# --- measuring ------------------------------------------------------------------------------------


def timed(step: Step, pairs: list[int], device: torch.device) -> tuple[float, float]:
    """(seconds, loss) of one step; gradients accumulate as they do in a run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step(pairs)
        torch.cuda.synchronize()
        return time.perf_counter() - began, loss
    began = time.process_time()
    loss = step(pairs)
    return time.process_time() - began, loss


def memory_of(name: str, bench: Bench) -> float:
    """`peak_of` one contender, with models of its own."""
    policy, reference = models(bench)
    step = contender(name, bench, policy, reference)
    set_checkpointing(bench, name, policy)
    return peak_of(step, bench)


def peak_of(step: Step, bench: Bench) -> float:
    """Peak MB over what the models take, of two steps over the same pairs that are timed."""
    batches = batches_of(bench)[:2]
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        for pairs in batches:
            step(pairs)
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building left free would hide a part of the peak
    peak, stop = [0.0], threading.Event()
    base = _resident()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _resident() - base)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for pairs in batches:
        step(pairs)
    stop.set()
    watcher.join()
    return peak[0]


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def _names(args: argparse.Namespace) -> list[str]:
    return [*OURS, *args.against.split(",")]


def batches_of(bench: Bench) -> list[list[int]]:
    """The pairs of each step, by their place in the rows."""
    size = bench.args.batch
    return [
        list(range(start, start + size)) for start in range(0, len(bench.rows) - size + 1, size)
    ]


def flops(bench: Bench, name: str, policy: Any, recomputed: bool = True) -> float:
    """Multiplications and additions on paper that this contender needs for all pairs: causal
    attention, no waste.

    TRL feeds each micro-batch padded to its longest; we feed prompt | chosen | rejected. Both heads
    are counted on completion tokens alone (on a CPU TRL's scores every token); TRL makes its logits
    again in the backward pass. recomputed: count what is computed a second time, too.
    """
    cost = pair_cost(policy)
    live = name in ("ours-live", "trl-live", "trl-default")
    checkpointing = name == "trl-default" or bench.args.gradient_checkpointing
    body, head = 3 + live + (recomputed and checkpointing), 3 + live + (recomputed and name in TRL)
    lengths = [
        [len(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        for row in bench.rows
    ]
    micro = _trl_micro(bench, name) if name in TRL else 1
    total = 0.0
    for start in range(0, len(lengths), micro):
        chunk = lengths[start : start + micro]
        width = max(p + max(c, r) for p, c, r in chunk)
        for p, c, r in chunk:
            tokens = 2 * width if name in TRL else p + c + r
            seen = width**2 if name in TRL else ((p + c) ** 2 + (p + r) ** 2 - p**2) / 2
            total += body * (cost.token * tokens + cost.seen * seen) + head * cost.scored * (c + r)
    return 2 * total


def compare(bench: Bench) -> dict[str, Any]:
    """Run every contender on every batch, in turns, `rounds` times."""
    names = _names(bench.args)
    built: dict[str, tuple[Any, Any]] = {}
    for name in names:
        built[name] = built[names[0]] if built and bench.args.size in LARGE else models(bench)
    steps = {name: contender(name, bench, *built[name]) for name in names}
    policy = built[names[0]][0]
    batches = batches_of(bench)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    largest = 0.0
    for number in range(bench.args.rounds + 1):
        round_seconds = dict.fromkeys(names, 0.0)
        for pairs in batches[:1] if number == 0 else batches:  # round 0 warms up
            losses: dict[str, float] = {}
            for name in names:
                set_checkpointing(bench, name, built[name][0])
                took, losses[name] = timed(steps[name], pairs, bench.device)
                round_seconds[name] += took
                for model in built[name]:
                    model.zero_grad(set_to_none=bench.args.size in LARGE)
            largest = max(largest, max(losses.values()) - min(losses.values()))
        if number:
            for name in names:
                seconds[name].append(round_seconds[name])
    tolerance = TOLERANCE[bench.args.precision]
    if not largest <= tolerance:
        raise SystemExit(
            f"losses differ by {largest:.2e}, more than {tolerance}: these are not the same step"
        )
    pairs = sum(map(len, batches))
    used = [row for batch in batches for row in (bench.rows[index] for index in batch)]
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in used
    )
    share = pairs / len(bench.rows)
    return {
        "pairs": pairs,
        "tokens_per_pair": tokens / pairs,
        "largest_difference_of_losses": largest,
        "contenders": {
            name: {
                "seconds_per_pair": statistics.median(took) / pairs,
                "tokens_per_s": tokens / statistics.median(took),
                "rounds": [took_ / pairs for took_ in took],
                "flops": flops(bench, name, policy) * share,
                "flops_needed": flops(bench, name, policy, recomputed=False) * share,
            }
            for name, took in seconds.items()
        },
    }


# --- the table ------------------------------------------------------------------------------------


def report(bench: Bench, results: dict[str, Any]) -> None:
    """The table, with the ratio of ours to each of TRL's, its spread over rounds, and the ceiling
    on paper.
    """
    contenders = results["contenders"]
    device = (
        torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else f"CPU, {bench.args.threads} thread(s)"
    )
    peak = next((value for name, value in PEAK_FLOPS.items() if name in device), None)
    print(
        f"{results['pairs']} pairs of {bench.args.data}, "
        f"{results['tokens_per_pair']:.0f} tokens each, "
        f"model {bench.args.size} in {bench.args.precision}, {device}; "
        f"losses agree to {results['largest_difference_of_losses']:.1e}"
    )
    kind = "s" if bench.device.type == "cuda" else "CPU s"
    peak = peak if bench.args.precision == "bf16" else None
    print(f"{'':13}{kind + '/pair':>12}{'tokens/s':>12}{'peak MB':>10}{'MFU':>7}")
    for name, row in contenders.items():
        used = (
            f"{row['flops_needed'] / (row['seconds_per_pair'] * results['pairs']) / peak:.0%}"
            if peak
            else "-"
        )
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else "-"
        print(
            f"{name:13}{row['seconds_per_pair']:12.4f}{row['tokens_per_s']:12,.0f}"
            f"{memory:>10}{used:>7}"
        )
    print(f"\n{'ratio of':13}{'to':13}{'time':>7}{'rounds':>15}{'on paper':>10}{'memory':>8}")
    for mine in OURS:
        for theirs in (name for name in contenders if name in TRL):
            ratios = [
                b / a
                for a, b in zip(
                    contenders[mine]["rounds"], contenders[theirs]["rounds"], strict=True
                )
            ]
            paper = contenders[theirs]["flops"] / contenders[mine]["flops"]
            memory = (
                f"{contenders[mine]['peak_mb'] / contenders[theirs]['peak_mb']:.2f}"
                if "peak_mb" in contenders[mine]
                else "-"
            )
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            print(
                f"{theirs:13}{mine:13}{statistics.median(ratios):7.2f}{spread:>15}"
                f"{paper:10.2f}{memory:>8}"
            )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="synthetic:1",
        help="a file of preference pairs, or synthetic:RATIO, prompt to mean completion",
    )
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--against", default="trl-default,trl-best", help=",".join(TRL))
    parser.add_argument("--size", choices=SIZES, default="bench")
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="in ours and in trl-live, trl-best too",
    )
    parser.add_argument("--trl-micro", type=int, default=4, help="pairs of a padded micro-batch")
    parser.add_argument(
        "--max-length", type=int, default=1024, help="tokens of a prompt and one completion"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--json", help="write what was found here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script calls itself
    return parser.parse_args()


def main() -> None:
    """Time all, then measure each one's memory in a process of its own."""
    args = arguments()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(args, Path(folder))
        if args.memory_of:
            print(memory_of(args.memory_of, bench))
            return
        peaks: dict[str, float] = {}
        for name in [] if args.no_memory else _names(args):  # before this process takes any
            command = [sys.executable, *sys.argv, "--memory-of", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[name] = float(done.splitlines()[-1])
        results = compare(bench)
        for name, peak in peaks.items():
            results["contenders"][name]["peak_mb"] = peak
    report(bench, results)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), **results}, indent=1) + "\n"
        )


def quiet() -> None:
    """Libraries' progress bars and advice would bury the table."""
    import datasets
    import transformers

    os.environ["TQDM_DISABLE"] = "1"  # TRL asks for it when it precomputes
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


if __name__ == "__main__":
    main()
