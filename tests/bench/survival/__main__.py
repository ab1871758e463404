"""The survival table: the same faults for the same tiny DPO run on four systems, three runs each.

    python tests/bench/survival --out survival.json
    python tests/bench/survival --systems trl,ours-debug --faults kill-one,hang --runs 1

Systems: ours (`orchestrator debug` in a shell loop, `orchestrator train` on a local Ray), bare Ray
Train, TRL's DPOTrainer in a shell loop, DeepSpeed's checkpoints under torchrun --max-restarts; each
as its documentation says (the pages are named in the scripts beside this one), each with three
restarts, the same time-out of collectives and the newest two checkpoints, on two CPU ranks (gloo).

Columns (medians): recovered: exit code 0, every step taken and finite weights, without a person;
again: steps that were taken more than once; seconds: from the fault to the first step that was not
taken before it; bitwise: the weights of that system's own undisturbed run; the user reads: where
the run recovered the last line after the fault and before ranks start again, else the last line of
all, lines of progress left out. Needs Linux; a full disk needs root (a tmpfs).
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cell
import task
from injector import FAULTS
from systems import SYSTEMS

Results = dict[str, dict[str, list[dict[str, Any]]]]
"""By system and fault: the runs."""


def main() -> None:
    """Fill the table, printing a line for each run."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the finally below
    cell.adopt_orphans()
    results: Results = {name: {} for name in args.systems}
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="survival-", ignore_cleanup_errors=True) as scratch:
        folder = Path(args.keep or scratch).resolve()
        (folder / "task").mkdir(parents=True)
        os.environ |= {
            task.TASK: str(folder / "task"),
            "SURVIVAL_TIMEOUT_S": str(args.timeout),
        }
        task.write(folder / "task")
        try:
            for number in range(1, args.runs + 1):
                for fault in args.faults:
                    for name in args.systems:
                        here = folder / f"{name}.{fault}.{number}"
                        one = {"load": os.getloadavg()[0]}
                        one |= cell.run(SYSTEMS[name], fault, here, args.bound)
                        results[name].setdefault(fault, []).append(one)
                        judge(results[name], fault)
                        print(f"{here.name}: {shown(one)}", file=sys.stderr, flush=True)
                        save(args, results, began)
        finally:
            cell.close_descendants()
    print(table(results, args.faults))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def names(known: dict[str, Any]) -> Any:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if wrong := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"{wrong[0]}: choose from {', '.join(known)}")
            return chosen

        return parse

    parser.add_argument("--systems", type=names(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--faults", type=names(FAULTS), default=list(FAULTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=20, help="of collectives, in seconds")
    parser.add_argument(
        "--bound", type=float, default=120, help="seconds without a sign of life that end a run"
    )
    parser.add_argument("--keep", help="keep all files of the runs in this new folder")
    parser.add_argument("--out", help="write every run's measures here, as JSON")
    args = parser.parse_args()
    if "none" not in args.faults:
        args.faults = ["none", *args.faults]  # whose weights are compared
    return args


def judge(runs: dict[str, list[dict[str, Any]]], fault: str) -> None:
    """Add to the newest run of a fault whether it recovered, and with which weights."""
    one, twin = runs[fault][-1], runs["none"][0]
    if "not_run" in one:
        return
    is_complete = one["exit_codes"][-1] == 0 and one["last_step"] == task.STEPS
    one["recovered"] = is_complete and one["finite"]
    one["bitwise"] = one["sha256"] is not None and one["sha256"] == twin.get("sha256")
    one["outcome"] = outcome(one, is_complete)
    one["read"] = one["answer" if one["recovered"] else "last_line"]


def outcome(one: dict[str, Any], is_complete: bool) -> str:
    """Say in words how a run ended."""
    if one["recovered"]:
        return "yes"
    if is_complete:
        return (
            "no: exit code 0, weights not finite" if one["sha256"] else "no: exit code 0, no model"
        )
    where = f"after step {one['last_step']}"
    if one["ended_because"]:
        return f"no: {one['ended_because']} {where}"
    return f"no: exit code {one['exit_codes'][-1]} {where}"


def shown(one: dict[str, Any]) -> str:
    """Return a run as a line."""
    if "not_run" in one:
        return f"not run: {one['not_run']}"
    seconds = "-" if one["seconds"] is None else f"{one['seconds']:.1f} s"
    bitwise = "bitwise" if one["bitwise"] else "other weights" if one["sha256"] else "no weights"
    return f"{one['outcome']}, {one['again']} again, {seconds}, {bitwise}, {cut(one['read'])}"


def save(args: argparse.Namespace, results: Results, began: float) -> None:
    """Write what is known so far: an interrupted table is not lost."""
    if args.out:
        about = {
            "arguments": vars(args),
            "cpus": os.cpu_count(),
            "hours": round((time.time() - began) / 3600, 2),
            "versions": versions(),
        }
        Path(args.out).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of the systems."""
    from importlib.metadata import version

    names = ("torch", "ray", "trl", "transformers", "accelerate", "deepspeed")
    return {name: version(name) for name in names}


def table(results: Results, chosen: list[str]) -> str:
    """Return the Markdown table."""
    lines = [
        "| fault | system | recovered | steps again | seconds | bitwise | the user reads |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in chosen:
        for name, runs in results.items():
            head = f"| {FAULTS[fault].title} | {SYSTEMS[name].title} |"
            lines.append(f"{head} {' | '.join(summary(runs.get(fault, [])))} |")
    return "\n".join(lines)


def summary(all_runs: list[dict[str, Any]]) -> list[str]:
    """Return the measures of a cell over its runs."""
    runs = [one for one in all_runs if "not_run" not in one]
    if not runs:
        why = all_runs[0]["not_run"] if all_runs else "interrupted"
        return [f"not run: {why}", "", "", "", ""]
    outcomes = Counter(one["outcome"] for one in runs).most_common()
    recovered = "; ".join(f"{text} ({n} of {len(runs)})" for text, n in outcomes)
    if len(outcomes) == 1:
        recovered = outcomes[0][0]
    again = f"{statistics.median(one['again'] for one in runs):g}"
    times = [one["seconds"] for one in runs if one["seconds"] is not None]
    seconds = f"{statistics.median(times):.0f}" if times else "-"
    same = sum(one["bitwise"] for one in runs)
    bitwise = {0: "no", len(runs): "yes"}.get(same, f"{same} of {len(runs)}")
    if not any(one["sha256"] for one in runs):
        bitwise = "-"
    return [recovered, again, seconds, bitwise, cut(runs[0]["read"])]


def cut(line: str) -> str:
    """Return a line, shortened, as a cell of a table."""
    line = " ".join(line.split()).replace("|", "/").replace("`", "'")
    return "(nothing)" if not line else line if len(line) <= cell.LINE else line[: cell.LINE] + "…"


if __name__ == "__main__":
    main()
