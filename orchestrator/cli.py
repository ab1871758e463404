"""The verbs of the command line; each only parses, calls one function and says how it ended."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from orchestrator.settings.load import load_spec
from orchestrator.settings.spec import Exported, RunSpec, UserError

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
    """Train here, without Ray; or look at a step."""
    _check_flags(args)
    if args.replay_step is not None:
        return _replay(args)
    spec = _spec(args)
    from orchestrator.run import debug as here
    from orchestrator.training.rundir import RunDir
    from orchestrator.training.worker import last_result
    from orchestrator.world import is_one_of_many

    leaves_nothing = args.overfit or args.dry_run
    if args.nproc > 1 and not is_one_of_many():
        command = [sys.executable, "-m", "orchestrator.cli", "debug", *args.settings, *_flags(args)]
        code = here.debug_ranks(spec, args.nproc, command, args.profile, keeps_run=not leaves_nothing)
        result = last_result(RunDir(spec.run_dir)) if code in (DONE, STOPPED) and not leaves_nothing else None
        return _say_how_it_ended(spec, result) if result else code
    if leaves_nothing:
        from orchestrator.run import trial

        (trial.overfit if args.overfit else trial.dry_run)(spec, post_mortem=args.pdb)
        return DONE
    result = here.debug(spec, post_mortem=args.pdb, profile=args.profile)
    if is_one_of_many():  # whoever started this rank says how it ended
        return STOPPED if result.status == "stopped" else DONE
    return _say_how_it_ended(spec, result)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of `debug` that contradict each other."""
    given = {"--profile": args.profile is not None}
    if args.overfit:
        _refuse_beside("--overfit", True, "keeps nothing", given)
    given["--overfit"] = args.overfit
    if args.dry_run:
        _refuse_beside("--dry-run", True, "takes no step", given)
    given |= {"--dry-run": args.dry_run, "--nproc": args.nproc > 1}
    if args.replay_step is not None:
        _refuse_beside("--replay-step", args.replay_step, "looks at one step, in one process", given)


def _refuse_beside(flag: str, value: object, what: str, others: dict[str, bool]) -> None:
    for other, is_given in others.items():
        if is_given:
            raise UserError(flag, value, f"{what}, where {other} has no meaning", f"remove {other} or {flag}")


def _flags(args: argparse.Namespace) -> list[str]:
    """The flags of `debug` that each rank gets."""
    flags = [flag for flag in ("--pdb", "--overfit", "--dry-run") if getattr(args, flag[2:].replace("-", "_"))]
    if args.profile is not None:
        flags.append("--profile=" + ":".join(map(str, args.profile)))
    return flags


def _replay(args: argparse.Namespace) -> int:
    from orchestrator.run.replay import lines, replay
    from orchestrator.training.rundir import RunDir

    folders = [word for word in args.settings if "=" not in word]
    if len(folders) != 1:
        raise UserError("RUN_DIR", " ".join(folders) or None, "one run is replayed", "give the folder run.dir/run.name")
    overrides = [word for word in args.settings if "=" in word]
    print("\n".join(lines(replay(RunDir.existing(folders[0]), args.replay_step, overrides, args.pdb))))
    return DONE


def plan(args: argparse.Namespace) -> int:
    """Say what a run would be, without starting it."""
    from orchestrator.run.plan import planned

    spec = _spec(args)
    facts = planned(spec)
    if not args.json:
        _print_facts(facts)
    if args.show_rows:
        from orchestrator.run import rows

        if args.json:
            facts |= rows.facts(spec, args.show_rows)
        else:
            print()
            for line in rows.lines(spec, args.show_rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ):
                print(line, flush=True)
    if args.json:
        print(json.dumps(facts))
    return DONE


def submit(args: argparse.Namespace) -> int:
    """Check the run here and hand it to a cluster."""
    if args.to == "slurm" and (args.address or not args.wait):
        flag = "--address" if args.address else "--no-wait"
        raise UserError("--to", "slurm", f"{flag} is of a Ray cluster's job server", f"remove {flag}, or say --to ray")
    spec = _spec(args)
    from orchestrator.run import submit as to
    from orchestrator.run.plan import planned

    if args.to == "ray" and (elsewhere := to.not_on_this_machine(spec)):
        print(f"{elsewhere} is not on this machine: its rows are looked at where the run starts")
    else:
        _print_facts(planned(spec))
    if args.to == "slurm":
        return to.to_slurm(spec)
    return to.to_ray(spec, args.address, args.wait)


def stop(args: argparse.Namespace) -> int:
    """Ask a run, wherever it runs, to save and stop."""
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir(Path(args.run_dir))
    if (owner := run_dir.owner()) is None:
        print(f"{RunDir.existing(args.run_dir).path} is not running")
        return DONE
    run_dir.stop.write_text("orchestrator stop")
    print(f"asked {owner}: it saves after the step under way and ends with exit code {STOPPED}")
    return DONE


def doctor(args: argparse.Namespace) -> int:
    """Look at every node that would train."""
    spec = _spec(args) if args.settings else None
    from orchestrator.run import driver, preflight

    checks = driver.doctor(spec)
    print(preflight.table(checks))
    return WRONG if preflight.refusal(checks) else DONE


def verify(args: argparse.Namespace) -> int:
    """Check every file of every checkpoint, and of the pair ledger, against its manifest."""
    from orchestrator.training import ledger
    from orchestrator.training.manifest import committed
    from orchestrator.training.manifest import verify as check
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
    if (wrong := ledger.verify(run_dir)) is not None:
        bad += bool(wrong)
        print(f"{run_dir.pairs.name}: {'; '.join(wrong) or 'whole'}")
    if not folders:
        print("no checkpoint")
    return FAILED if bad or not folders else DONE


def pairs(args: argparse.Namespace) -> int:
    """Say what training made of each pair."""
    from orchestrator.data.sources import raw_rows
    from orchestrator.insight import pairs as insight
    from orchestrator.training import ledger
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir.existing(args.run_dir)
    step, rows = ledger.read(run_dir)
    if not rows.num_rows:
        cure = "train on with training.pair_ledger=true"
        raise UserError("RUN_DIR", args.run_dir, f"has kept nothing of its pairs up to step {step}", cure)
    found = insight.findings(step, rows)
    try:
        texts = raw_rows(load_spec(run_dir.config).data, "train", found.shown(args.top))
    except UserError as error:  # another folder than that of the run, for one; the numbers are still there
        print(f"the texts are left out: {error}", file=sys.stderr)
        texts = {}
    if args.json:
        print(json.dumps(insight.as_json(found, args.top, texts)))
    else:
        print("\n".join(insight.lines(found, args.top, texts)))
    return DONE


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from orchestrator.training.export import export as write
    from orchestrator.training.rundir import RunDir

    print(f"model: {write(RunDir.existing(args.run_dir), Path(args.out), args.dtype, which=args.checkpoint)}")
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


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        for entry in value if isinstance(value, list) and isinstance(value[0], dict) else [value]:
            said = ", ".join(f"{key} {each}" for key, each in entry.items()) if isinstance(entry, dict) else entry
            print(f"{name:<{width}}  {said}")


def _say_how_it_ended(spec: RunSpec, result: "RunResult") -> int:
    run_dir = spec.run_dir
    if result.status == "stopped":
        print(f"stopped after step {result.step} ({result.reason}) and saved; the same command resumes")
        return STOPPED
    from orchestrator.training.manifest import step_folder
    from orchestrator.training.metrics import evaluated_sets

    lines = list(map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()))
    print(f"\nfinished after step {result.step} ({result.reason})")
    for name, prefix in evaluated_sets(dict.fromkeys(key for line in lines for key in line)).items():
        evaluations = [line for line in lines if f"{prefix}loss" in line]
        before = [line for line in evaluations if not line["step"]]
        for when, line in zip(["before"] * len(before) + ["after"], [*before, evaluations[-1]], strict=True):
            facts = f"loss {line[f'{prefix}loss']:.6f}, rewards/accuracies {line[f'{prefix}rewards/accuracies']:.3f}"
            print(f"evaluation {when:<6}  {facts}{f' ({name})' * bool(name)}")
    if result.best_step is not None:
        best = step_folder(run_dir / "checkpoints", result.best_step)
        print(f"best     {spec.evaluation.best_metric} {result.best_metric:.6f} after step {result.best_step}, {best}")
    of_step = f", of step {result.model_step}" if result.best_step is not None else ""
    print(f"model    {result.model}{of_step}\nmetrics  {run_dir / 'metrics.jsonl'}")
    if spec.wandb.mode != "disabled":
        print(f"W&B      {run_dir / 'wandb'}")
    return DONE


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The words of the command line; settings may stand before and after options, which argparse alone refuses, and
    after a bare --profile, which it would take for its range."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    for at, (word, following) in enumerate(pairwise([*words, ""])):
        if word == "--profile" and not re.fullmatch(r"\d+(:\d+)?", following):
            words[at] = "--profile="
    args, rest = parser.parse_known_args(words)
    if rest and (not hasattr(args, "settings") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.settings += rest
    return args


def _whole(what: str) -> Callable[[str], int]:
    """Reads a whole number from 1 on, which is `what`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return read


def _steps(text: str) -> tuple[int, ...]:
    ends = [int(end) if end.isdecimal() else 0 for end in text.split(":") if text]
    if len(ends) > 2 or 0 in ends or ends != sorted(ends):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps, which are counted from 1; for example 3:5")
    return tuple(ends)


def _add_debug_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--pdb", action="store_true", help="a debugger where an exception is raised")
    sub.add_argument("--overfit", action="store_true", help="learn the first global batch by heart; keep nothing")
    sub.add_argument("--dry-run", action="store_true", help="build all, one forward and backward pass; keep nothing")
    trace = "write a trace of these steps (the third to the fifth) into RUN_DIR/profile"
    sub.add_argument("--profile", type=_steps, nargs="?", metavar="FIRST:LAST", help=trace)
    sub.add_argument(
        "--replay-step",
        type=_whole("a step; they are counted from 1"),
        metavar="N",
        help="of the run in RUN_DIR, given as FILE: every pair of step N",
    )


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
        add(submit, "check the run here, then hand it to a Ray cluster's job server or to Slurm"),
    ]
    for sub in takes_settings:
        sub.add_argument(
            "settings", nargs="+", metavar="FILE|key=value", help="YAML files, merged left to right, then overrides"
        )
    takes_settings[1].add_argument(
        "--nproc",
        type=_whole("a number of processes, 1 or more"),
        default=1,
        metavar="N",
        help="ranks, one process each",
    )
    _add_debug_flags(takes_settings[1])
    takes_settings[2].add_argument("--json", action="store_true", help="one JSON object instead of lines")
    shown = "the first N training rows as the model will see them, and how long all rows are; tokenises the data"
    takes_settings[2].add_argument("--show-rows", type=_whole("a number of rows, 1 or more"), metavar="N", help=shown)
    submits = takes_settings[3]
    submits.add_argument("--to", choices=("ray", "slurm"), required=True, help="what takes the run")
    submits.add_argument("--address", metavar="URL", help="Ray's job server, http://HEAD:8265; RAY_API_SERVER_ADDRESS")
    submits.add_argument(
        "--no-wait", dest="wait", action="store_false", help="of Ray: do not follow the log to the run's exit code"
    )
    doctors = add(doctor, "look at every node of the cluster at RAY_ADDRESS, or at this machine, as before a run")
    doctors.add_argument("settings", nargs="*", metavar="FILE|key=value", help="of the run; without: what needs none")
    stops = add(stop, "ask a run to save and stop; the command that started it resumes it")
    stops.add_argument("run_dir", metavar="RUN_DIR")
    checks = add(verify, "check every file of every checkpoint, and of the pair ledger, against its manifest")
    checks.add_argument("run_dir", metavar="RUN_DIR")
    looks = add(pairs, "which pairs a run never learned, which look mislabelled, and what length has to do with it")
    looks.add_argument("run_dir", metavar="RUN_DIR")
    number = _whole("a number of pairs")
    looks.add_argument("--top", type=number, default=5, metavar="N", help="pairs that are shown of each kind")
    looks.add_argument("--json", action="store_true", help="one JSON object, texts whole")
    exports = add(export, "write a checkpoint as a Hugging Face model folder")
    exports.add_argument("run_dir", metavar="RUN_DIR")
    exports.add_argument("out", metavar="OUT")
    exports.add_argument(
        "--checkpoint", choices=get_args(Exported), help="the newest that is whole, or the best; as checkpoint.export"
    )
    exports.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the written weights"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
