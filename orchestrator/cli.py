"""The verbs of the command line; each only parses, calls one function and says how it ended."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.settings.load import load_spec
from orchestrator.settings.spec import RunSpec, UserError

if TYPE_CHECKING:
    from orchestrator.training.worker import RunResult

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code: 0 done, 2 settings or data are wrong, 3 stopped and resumable, 1 else."""
    args = _parsed(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.path.insert(0, os.getcwd())  # the user's callbacks and collators, as `python -m` would find them
    verb: Callable[[argparse.Namespace], int] = args.verb
    try:
        return verb(args)
    except UserError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return FAILED
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        if type(error).__name__ in ("TrainingError", "RunDied"):  # by name: importing them here would import torch
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return FAILED
        raise


def train(args: argparse.Namespace) -> int:
    """Train on Ray."""
    spec = _spec(args)
    from orchestrator.run import driver

    return _say_how_it_ended(spec, driver.train(spec))


def debug(args: argparse.Namespace) -> int:
    """Train here, without Ray."""
    spec = _spec(args)
    from orchestrator.run import debug as here
    from orchestrator.training.rundir import RunDir
    from orchestrator.training.worker import last_result
    from orchestrator.world import is_one_of_many

    if args.nproc > 1 and not is_one_of_many():
        command = [sys.executable, "-m", "orchestrator.cli", "debug", *args.settings]
        code = here.debug_ranks(spec, args.nproc, command)
        result = last_result(RunDir(spec.run_dir)) if code in (DONE, STOPPED) else None
        return _say_how_it_ended(spec, result) if result else code
    result = here.debug(spec)
    if is_one_of_many():  # whoever started this rank says how it ended
        return STOPPED if result.status == "stopped" else DONE
    return _say_how_it_ended(spec, result)


def plan(args: argparse.Namespace) -> int:
    """Say what a run would be, without starting it."""
    from orchestrator.run.plan import planned

    facts = planned(_spec(args))
    if args.json:
        print(json.dumps(facts))
    else:
        width = max(map(len, facts))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    return DONE


def verify(args: argparse.Namespace) -> int:
    """Check every file of every checkpoint against its manifest."""
    from orchestrator.training.checkpoint import committed
    from orchestrator.training.checkpoint import verify as check
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir.existing(args.run_dir)
    folders, bad = committed(run_dir.checkpoints), 0
    for folder in folders:
        try:
            wrong = check(folder)
        except (UserError, OSError) as error:  # of this one; the others are still looked at
            wrong = [str(error)]
        bad += bool(wrong)
        print(f"{folder.name}: {'; '.join(wrong) or 'whole'}")
    if not folders:
        print("no checkpoint")
    return FAILED if bad or not folders else DONE


def export(args: argparse.Namespace) -> int:
    """Write the newest whole checkpoint as a Hugging Face folder."""
    from orchestrator.training.export import export as write
    from orchestrator.training.rundir import RunDir

    print(f"model: {write(RunDir.existing(args.run_dir), Path(args.out), args.dtype)}")
    return DONE


def _spec(args: argparse.Namespace) -> RunSpec:
    files = [word for word in args.settings if "=" not in word]
    overrides = [word for word in args.settings if "=" in word]
    for word in files:
        if not word.endswith((".yaml", ".yml")) and not os.path.isfile(word):
            rule = "is neither a YAML file nor of the form key=value"
            raise UserError("override", word, rule, f"for example {word}=VALUE")
    if not files:
        raise UserError(
            "FILE", None, "no settings file was given", "for example orchestrator train configs/quickstart.yaml"
        )
    return load_spec(files, overrides)


def _say_how_it_ended(spec: RunSpec, result: "RunResult") -> int:
    run_dir = spec.run_dir
    if result.status == "stopped":
        print(f"stopped after step {result.step} ({result.reason}) and saved; the same command resumes")
        return STOPPED
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if "eval_loss" in line]
    print(f"\nfinished after step {result.step} ({result.reason})")
    for when, line in zip(("before", "after"), (evaluations[:1] + evaluations[-1:]), strict=False):
        accuracy = line["eval_rewards/accuracies"]
        print(f"evaluation {when:<6}  loss {line['eval_loss']:.6f}, rewards/accuracies {accuracy:.3f}")
    print(f"model    {result.model}\nmetrics  {run_dir / 'metrics.jsonl'}")
    if spec.wandb.mode != "disabled":
        print(f"W&B      {run_dir / 'wandb'}")
    return DONE


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The words of the command line; settings may stand before and after options, which argparse alone refuses."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings += rest
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orchestrator", description="Distributed preference training, described by one YAML."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(verb: Callable[[argparse.Namespace], int], description: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(verb.__name__, help=description, description=description)
        sub.set_defaults(verb=verb)
        return sub

    takes_settings = [
        add(train, "train on Ray: a local one, or the cluster at RAY_ADDRESS"),
        add(debug, "the same worker in this process, without Ray; breakpoints work"),
        add(plan, "validate the settings and print the batch arithmetic"),
    ]
    for sub in takes_settings:
        sub.add_argument(
            "settings", nargs="+", metavar="FILE|key=value", help="YAML files, merged left to right, then overrides"
        )
    takes_settings[1].add_argument("--nproc", type=_count, default=1, metavar="N", help="ranks, one process each")
    takes_settings[2].add_argument("--json", action="store_true", help="one JSON object instead of lines")
    checks = add(verify, "check every file of every checkpoint against its manifest")
    checks.add_argument("run_dir", metavar="RUN_DIR")
    exports = add(export, "write the newest whole checkpoint as a Hugging Face model folder")
    exports.add_argument("run_dir", metavar="RUN_DIR")
    exports.add_argument("out", metavar="OUT")
    exports.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the written weights"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
