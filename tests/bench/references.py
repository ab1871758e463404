"""Each kind of reference against TRL's of that kind, on the same pairs and weights: seconds a pair,
and memory.

    python tests/bench/references.py --data pairs.jsonl --pairs 24
    python tests/bench/references.py --data pairs.jsonl --only shared,trl-shared --no-memory
    python tests/bench/references.py --data pairs.jsonl --markdown   (docs/benchmarks.md's table)

The model is step.py's "bench" in fp32, and a step is what a step is there. Policy and reference
start alike; then what trains of the policy is moved, by the same noise for every contender. TRL
runs as it is best and exact: no gradient checkpointing, one pair at a time, transformers' own norms
and MLPs. The mean loss of each batch must be that of TRL's contender of the same kind.

    times       TRL's seconds over ours, with the least and the most of it in any round
    peak        the most memory that two steps take over what is there before them, in a process of
                its own
    weights     the reference's, where they are not the policy's own storage
    sum         of both: what having that reference, and a step with it, takes
    of it       our memory as a part of TRL's

Wanted of 4 layers of 6 shared, against TRL's shared layers (which it runs twice and does not
cache): 2.8 times the speed with the trunk run once and 3.8 with cached log-probs; at most 0.4 of
the memory.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step import Bench, Step, batches_of, ours, peak_of, prepared, quiet, timed, trl

from orchestrator.data.collate import PackedCollator
from orchestrator.models.build_reference import build_reference
from orchestrator.models.policy import build_policy
from orchestrator.models.reference import PolicyStart, Reference
from orchestrator.settings.load import make_spec
from orchestrator.training.start_check import LogpError

SHARED = 4  # layers, of 6
# Tolerances of the mean loss of a batch. TRL's sums in fp32 alone are off by 3e-5, ours by 6e-7. 16
# and 8 bits round hidden states, too, where a last bit becomes a whole step; TRL's 4 bit layers
# compute in bf16 on a CPU that can.
EXACT, BITS_16, BITS_8, BITS_4 = 5e-5, 5e-3, 5e-3, 2e-2


class Ours(NamedTuple):
    """A reference as our settings ask for it, and the contender of TRL's whose losses it must
    have.
    """

    reference: dict[str, Any]
    twin: str
    tolerance: float = EXACT
    lora: dict[str, Any] | None = None


class Trl(NamedTuple):
    """A reference as TRL's users get it.

    None: the policy's start, or the policy without its adapter.
    """

    reference: str | None = None
    precompute: bool = False
    lora: bool = False
    base: str | None = None


_SHARED = {"kind": "shared_layers", "num_shared_layers": SHARED}
OURS = {
    "copy": Ours({"kind": "copy"}, "trl-copy"),
    "offloaded": Ours({"kind": "copy", "offload": True}, "trl-copy"),
    "bf16": Ours({"kind": "copy", "dtype": "bf16"}, "trl-bf16", BITS_16),
    "precomputed": Ours({"kind": "precomputed"}, "trl-precomputed"),
    "shared": Ours(_SHARED, "trl-shared"),
    "shared-cached": Ours({**_SHARED, "cache": "full"}, "trl-shared"),
    "int8": Ours({"kind": "int8"}, "trl-int8", BITS_8),
    "nf4": Ours({"kind": "nf4"}, "trl-nf4", BITS_4),
    "lora": Ours({"kind": "adapter_off"}, "trl-lora", lora={}),
    "lora-precomputed": Ours({"kind": "precomputed"}, "trl-lora-precomputed", lora={}),
    "qlora": Ours({"kind": "adapter_off"}, "trl-qlora", lora={"base": "nf4"}),
}
TRL = {
    "trl-copy": Trl("copy"),
    "trl-bf16": Trl("bf16"),
    "trl-precomputed": Trl(precompute=True),
    "trl-shared": Trl("shared"),
    "trl-shared-cached": Trl("shared", precompute=True),
    "trl-int8": Trl("int8"),
    "trl-nf4": Trl("nf4"),
    "trl-lora": Trl(lora=True),
    "trl-lora-precomputed": Trl(lora=True, precompute=True),
    "trl-qlora": Trl(lora=True, base="nf4"),
}
# (what the table calls it, ours, TRL's)
ROWS = (
    ("copy", "copy", "trl-copy"),
    ("copy, offloaded", "offloaded", None),
    ("copy in bf16", "bf16", "trl-bf16"),
    ("precomputed", "precomputed", "trl-precomputed"),
    ("4 of 6 layers shared, live", "shared", "trl-shared"),
    ("the same cached, TRL's live", "shared-cached", "trl-shared"),
    ("the same, both cached", "shared-cached", "trl-shared-cached"),
    ("int8", "int8", "trl-int8"),
    ("nf4", "nf4", "trl-nf4"),
    ("LoRA, adapter off", "lora", "trl-lora"),
    ("LoRA, precomputed", "lora-precomputed", "trl-lora-precomputed"),
    ("LoRA on nf4, adapter off", "qlora", "trl-qlora"),
)
HEADS = (
    "reference",
    "CPU s/pair",
    "TRL",
    "times",
    "rounds",
    "peak MB",
    "TRL",
    "of it",
    "weights MB",
    "TRL",
    "sum MB",
    "TRL",
    "of it",
)


class Contender(NamedTuple):
    """A reference to time, and the facts known of it beforehand."""

    step: Step
    policy: Any
    own_mb: float  # of the reference's weights
    error: LogpError | None  # of an approximate reference of ours


# --- contenders -----------------------------------------------------------------------------------


def contender(name: str, bench: Bench) -> Contender:
    """Policy, reference and step of that name; what is to be known beforehand is computed by the
    policy's start.
    """
    results = _ours(OURS[name], bench) if name in OURS else _trl(TRL[name], bench)
    move(results.policy)
    return results


def _ours(kind: Ours, bench: Bench) -> Contender:
    raw = bench.spec.model_dump()
    raw["reference"] |= kind.reference
    raw["model"] |= {"lora": kind.lora}
    spec = make_spec(raw)
    policy = build_policy(spec, bench.tokenizer, torch.float32)
    reference = build_reference(spec, policy, torch.float32)
    step = ours(bench._replace(spec=spec), policy, reference, cached=spec.reference_cache == "full")
    error = error_of(reference, policy, bench) if spec.reference.is_approximate else None
    return Contender(step, policy, reference.own_bytes(policy) / 2**20, error)


@torch.no_grad()
def error_of(reference: Reference, policy: Any, bench: Bench) -> LogpError:
    """Return the distance of a reference from the policy's start, for which it stands, over all
    pairs.
    """
    collate, exact = PackedCollator(bench.spec.data), PolicyStart(policy)
    batches = [collate([row]) for row in bench.rows]
    # [pairs, 2]
    errors = torch.stack([reference.logps(batch) - exact.logps(batch) for batch in batches])
    margins = (errors[:, 0] - errors[:, 1]).abs()
    return LogpError(
        len(errors), errors.abs().max().item(), errors.abs().mean().item(), margins.max().item()
    )


def _trl(kind: Trl, bench: Bench) -> Contender:
    from peft import LoraConfig

    policy: Any = build_policy(bench.spec, bench.tokenizer, torch.float32)
    if kind.base is not None:
        policy = loaded(policy, kind.base, bench)
    reference = None if kind.reference is None else _reference_of_trl(kind.reference, policy, bench)
    lora = (
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if kind.lora
        else None
    )
    step = trl(bench, policy, reference, micro=1, precompute=kind.precompute, peft_config=lora)
    own = Reference(reference).own_bytes(policy) / 2**20 if reference is not None else 0.0
    return Contender(step, policy, own, None)


def _reference_of_trl(kind: str, policy: Any, bench: Bench) -> Any:
    from trl.experimental.utils import create_reference_model

    if kind == "shared":
        return create_reference_model(policy, num_shared_layers=SHARED)
    if kind == "bf16":
        return create_reference_model(policy).to(torch.bfloat16)
    return create_reference_model(policy) if kind == "copy" else loaded(policy, kind, bench)


def loaded(model: Any, kind: str, bench: Bench) -> Any:
    """The model in 8 or 4 bits, as transformers loads it from a folder."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    }
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else four))
    with tempfile.TemporaryDirectory(dir=bench.spec.run.dir) as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )


@torch.no_grad()
def move(policy: Any) -> None:
    """Change what trains by noise that depends on its name alone: the losses are not all ln 2, and
    those of contenders that train the same are the same.
    """
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        is_adapter = ".lora_" in name
        name = (
            name.rpartition(".lora_")[0] + name.partition(".lora_")[2][:1] if is_adapter else name
        )
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=draw)
        if is_adapter:
            # in fp32, where TRL would train adapters of a quantised base in bf16
            parameter.data = 0.03 * noise
        else:
            parameter += 0.3 * parameter.std().nan_to_num() * noise


# --- measuring ------------------------------------------------------------------------------------


def compare(names: list[str], bench: Bench) -> dict[str, Any]:
    """Run every contender on every batch, in turns, `rounds` times."""
    built = {name: contender(name, bench) for name in names}
    batches = batches_of(bench)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    differences: dict[str, float] = {}
    for number in range(bench.args.rounds + 1):
        round_seconds, losses = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for pairs in batches[:1] if number == 0 else batches:  # round 0 warms up
            for name, each in built.items():
                took, losses[name] = timed(each.step, pairs, bench.device)
                round_seconds[name] += took
                each.policy.zero_grad(set_to_none=False)
            for name in names:
                if name in OURS and OURS[name].twin in names:
                    difference = _agreeing(name, losses)
                    differences[name] = max(difference, differences.get(name, 0.0))
        if number:
            for name in names:
                seconds[name].append(round_seconds[name])
    pairs = sum(map(len, batches))
    return {
        name: {
            "seconds_per_pair": statistics.median(seconds[name]) / pairs,
            "rounds": [took / pairs for took in seconds[name]],
            "weights_mb": each.own_mb,
            "error": each.error._asdict() if each.error else None,
            "difference_of_losses": differences.get(name),
        }
        for name, each in built.items()
    }


def _agreeing(name: str, losses: dict[str, float]) -> float:
    """The difference between our loss and TRL's; raises where it is none of rounding."""
    difference = abs(losses[name] - losses[OURS[name].twin])
    if not difference <= OURS[name].tolerance:
        raise SystemExit(
            f"{name} and {OURS[name].twin} differ by {difference:.1e}: these are not the same step"
        )
    return difference


# --- the table ------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> list[list[str]]:
    """The cells of each row whose contender of ours was run."""
    values: list[list[str]] = []
    for label, our_name, trl_name in ROWS:
        if our_name not in results:
            continue
        here, there = results[our_name], results.get(trl_name)
        cells = [label, *_pair(here, there, "seconds_per_pair", 3), "-"]
        if there is not None:
            ratios = [b / a for a, b in zip(here["rounds"], there["rounds"], strict=True)]
            cells[3:] = [
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f}..{max(ratios):.2f}",
            ]
        peak, own = _pair(here, there, "peak_mb", 0), _pair(here, there, "weights_mb", 1)
        values.append([*cells, *peak, *own[:2], *_pair(here, there, "sum_mb", 0)])
    return values


def _pair(here: dict[str, Any], there: dict[str, Any] | None, key: str, digits: int) -> list[str]:
    """Ours, TRL's, and ours as a part of TRL's."""
    a, b = here.get(key), there.get(key) if there else None
    values = ["-" if value is None else f"{value:.{digits}f}" for value in (a, b)]
    return [*values, "-" if a is None or b is None else f"{a / b:.2f}" if b else "-"]


def report(bench: Bench, results: dict[str, Any]) -> None:
    """The table, as text or for docs/benchmarks.md, and how far approximate references are off."""
    cells = table(results)
    if bench.args.markdown:
        for row in [HEADS, ["---"] * len(HEADS), *cells]:
            print(f"| {' | '.join(row)} |")
    else:
        widths = [max(map(len, column)) + 2 for column in zip(HEADS, *cells, strict=True)]
        for row in [HEADS, *cells]:
            rest = "".join(
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            print(row[0].ljust(widths[0]) + rest)
    print()
    for name, row in results.items():
        if error := row["error"]:
            print(
                f"{name}: log-probs of {error['pairs']} pairs are off by at most "
                f"{error['largest']:.2g} nats, {error['mean']:.2g} on average; reward margins by "
                f"at most {bench.spec.dpo.beta * error['margin']:.2g}"
            )
    for name, row in results.items():
        if row["difference_of_losses"] is not None:
            print(
                f"{name}: mean losses of a batch are {OURS[name].twin}'s to "
                f"{row['difference_of_losses']:.0e}"
            )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="synthetic:1", help="a file of preference pairs, or synthetic:RATIO"
    )
    parser.add_argument("--only", help=f"of {','.join([*OURS, *TRL])}")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument(
        "--max-length", type=int, default=1024, help="tokens of a prompt and one completion"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table for docs/benchmarks.md"
    )
    parser.add_argument("--json", help="write what was found here")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script calls itself
    # what step.py asks for
    parser.set_defaults(size="bench", precision="fp32", gradient_checkpointing=False)
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else [*OURS, *TRL]
    if unknown := set(args.only) - {*OURS, *TRL}:
        parser.error(f"--only has no {', '.join(unknown)}")
    return args


def main() -> None:
    """Time all, then measure each one's memory in a process of its own."""
    args = arguments()
    quiet()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each layer and pass
    with tempfile.TemporaryDirectory() as folder:
        bench = prepared(args, Path(folder))
        if args.memory_of:
            bench = bench._replace(rows=bench.rows[: 2 * args.batch])  # those that are run
            print(peak_of(contender(args.memory_of, bench).step, bench))
            return
        peaks: dict[str, float] = {}
        for name in [] if args.no_memory else args.only:  # before this process takes any
            command = [sys.executable, *sys.argv, "--memory-of", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            peaks[name] = float(done.splitlines()[-1])
        results = compare(args.only, bench)
        for name, peak in peaks.items():
            results[name] |= {"peak_mb": peak, "sum_mb": peak + results[name]["weights_mb"]}
    report(bench, results)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"arguments": vars(args), "contenders": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
