"""Implement the verbs of the command line: each calls one function and prints the outcome."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import terminal
from orchestrator.arguments import files_and_overrides, parse
from orchestrator.settings.load import load_spec
from orchestrator.settings.spec import RunSpec, UserError

if TYPE_CHECKING:
    from orchestrator.training.result import RunResult

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 2 settings or data are wrong, 3 stopped and
    resumable, 1 else.

    Without argv, the words are those of sys.argv, and the standard streams of the process are
    prepared.
    """
    if argv is not None:
        return _run(argv)
    words = sys.argv[1:]
    terminal.prepare(keeps_going=words[:1] in (["train"], ["debug"]))
    code = _run(words)
    try:
        terminal.flush()
    except OSError as error:  # a full disk
        if code == DONE:
            print(f"error: {error}", file=sys.stderr)
        return code or FAILED
    return code


def _run(words: Sequence[str]) -> int:
    try:
        args = parse(words)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        sys.path.insert(
            0, os.getcwd()
        )  # to import the user's callbacks and collators, as `python -m` does
        return VERBS[args.verb](args)
    except UserError as error:
        _complain(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}")
        return WRONG
    except KeyboardInterrupt:
        _complain("aborted")
        return FAILED
    except OSError as error:  # a full disk, a folder without write permission
        _complain(f"error: {error}")
        return FAILED
    except Exception as error:
        if type(error).__name__ in (
            "TrainingError",
            "RunDied",
        ):  # by name: importing them here would import torch
            _complain(f"error: {' '.join(str(error).split())}")
            return FAILED
        raise


def _complain(line: str) -> None:
    """Write a line to stderr in one call: ranks share stderr, and print writes the line break
    separately.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def train(args: argparse.Namespace) -> int:
    """Train on Ray."""
    spec = _spec(args)
    if (done := _finished_already(spec)) is not None:
        return _say_how_it_ended(spec, done)
    from orchestrator.run.ray import driver

    return _say_how_it_ended(spec, driver.train(spec))


def debug(args: argparse.Namespace) -> int:
    """Train in this process without Ray, or examine a step."""
    _check_flags(args)
    if args.replay_step is not None:
        return _replay(args)
    spec = _spec(args)
    from orchestrator.training.result import last_result
    from orchestrator.training.rundir import RunDir
    from orchestrator.world import is_one_of_many

    leaves_nothing = args.overfit or args.dry_run
    looks_at_steps = leaves_nothing or args.profile is not None
    if (
        not looks_at_steps
        and not is_one_of_many()
        and (done := _finished_already(spec)) is not None
    ):
        return _say_how_it_ended(spec, done)
    from orchestrator.run.local import debug as here

    if args.nproc > 1 and not is_one_of_many():
        command = [sys.executable, "-m", "orchestrator.cli", "debug", *args.settings, *_flags(args)]
        code = here.debug_ranks(
            spec, args.nproc, command, args.profile, keeps_run=not leaves_nothing
        )
        result = (
            last_result(RunDir(spec.run_dir))
            if code in (DONE, STOPPED) and not leaves_nothing
            else None
        )
        return _say_how_it_ended(spec, result) if result else code
    if leaves_nothing:
        from orchestrator.run.local import trial

        (trial.overfit if args.overfit else trial.dry_run)(spec, post_mortem=args.pdb)
        return DONE
    result = here.debug(spec, post_mortem=args.pdb, profile=args.profile)
    if is_one_of_many():  # the process that started this rank prints the outcome
        return STOPPED if result.status == "stopped" else DONE
    return _say_how_it_ended(spec, result)


def _finished_already(spec: RunSpec) -> "RunResult | None":
    """Print and return the result of a run that has finished already; this needs neither torch nor
    ray.
    """
    from orchestrator.training.result import finished_already, finished_line
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir(spec.run_dir)
    done = finished_already(run_dir)
    if done is not None:
        run_dir.check(spec)
        print(finished_line(run_dir), flush=True)
    return done


def _check_flags(args: argparse.Namespace) -> None:
    """Check that the flags of `debug` do not contradict each other."""
    others = {"--profile": args.profile is not None}
    if args.overfit:
        _refuse_beside("--overfit", True, others)
    others["--overfit"] = args.overfit
    if args.dry_run:
        _refuse_beside("--dry-run", True, others)
    others |= {"--dry-run": args.dry_run, "--nproc": args.nproc > 1}
    if args.replay_step is not None:
        _refuse_beside("--replay-step", args.replay_step, others)


def _refuse_beside(flag: str, value: object, others: dict[str, bool]) -> None:
    for other, is_set in others.items():
        if is_set:
            raise UserError(
                flag, value, f"cannot be combined with {other}", f"remove {other} or {flag}"
            )


def _flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of `debug` that are passed to each rank."""
    flags = [
        flag
        for flag in ("--pdb", "--overfit", "--dry-run")
        if getattr(args, flag[2:].replace("-", "_"))
    ]
    if args.profile is not None:
        flags.append("--profile=" + ":".join(map(str, args.profile)))
    return flags


def _replay(args: argparse.Namespace) -> int:
    from orchestrator.run.local.replay import lines, replay
    from orchestrator.training.rundir import RunDir

    folders, overrides = files_and_overrides(args.settings)
    if len(folders) != 1:
        raise UserError(
            "RUN_DIR",
            " ".join(folders),
            "exactly one run can be replayed",
            "use the folder run.dir/run.name",
        )
    print(
        "\n".join(lines(replay(RunDir.existing(folders[0]), args.replay_step, overrides, args.pdb)))
    )
    return DONE


def plan(args: argparse.Namespace) -> int:
    """Print what a run would do, without starting it."""
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
            for line in rows.lines(
                spec, args.show_rows, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ
            ):
                print(line, flush=True)
    if args.json:
        print(json.dumps(facts))
    return DONE


def submit(args: argparse.Namespace) -> int:
    """Check the run here and submit it to a cluster."""
    if args.to is None:
        raise UserError("--to", None, "is required", "write --to ray or --to slurm")
    if args.to == "ray":
        return _submit_to_ray(_spec(args), args.address, args.wait)
    if args.address or not args.wait:
        flag = "--address" if args.address else "--no-wait"
        rule = f"{flag} applies only to a Ray cluster's job server"
        raise UserError("--to", "slurm", rule, f"remove {flag}, or write --to ray")
    return _submit_to_slurm(_spec(args))


def _submit_to_ray(spec: RunSpec, address: str | None, wait: bool) -> int:
    from orchestrator.run.plan import counted
    from orchestrator.run.ray.submit import not_on_this_machine
    from orchestrator.run.ray.submit import submit as submit_job

    if elsewhere := not_on_this_machine(spec):
        print(f"{elsewhere} is not on this machine: its rows are checked where the run starts")
    else:
        _print_facts(counted(spec))
    return submit_job(spec, address, wait)


def _submit_to_slurm(spec: RunSpec) -> int:
    from orchestrator.run.plan import planned
    from orchestrator.run.slurm import submit as submit_job

    _print_facts(planned(spec, starts_here=False))
    return submit_job(spec)


def stop(args: argparse.Namespace) -> int:
    """Signal a run, on any machine, to save and stop."""
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir(Path(args.run_dir))
    if (owner := run_dir.owner()) is None:
        print(f"{RunDir.existing(args.run_dir).path} is not running")
        return DONE
    run_dir.stop.write_text("orchestrator stop")
    print(f"signalled {owner}: it saves after the current step and exits with code {STOPPED}")
    return DONE


def doctor(args: argparse.Namespace) -> int:
    """Check every node that would train."""
    spec = _spec(args) if args.settings else None
    from orchestrator.run.checks.report import refusal, table
    from orchestrator.run.ray.node_checks import doctor as check_nodes

    checks = check_nodes(spec)
    print(table(checks))
    return WRONG if refusal(checks) else DONE


def verify(args: argparse.Namespace) -> int:
    """Check every file of all checkpoints and of the pair ledger against its manifest."""
    from orchestrator.training import ledger
    from orchestrator.training.manifest import committed
    from orchestrator.training.manifest import verify as check
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir.existing(args.run_dir)
    folders, bad = committed(run_dir.checkpoints), 0
    for folder in folders:
        try:
            wrong = check(folder)
        except (UserError, OSError) as error:  # of this checkpoint; the others are still checked
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
    """Print how each pair was learned."""
    from orchestrator.data.sources import raw_rows
    from orchestrator.insight import pairs as insight
    from orchestrator.training import ledger
    from orchestrator.training.rundir import RunDir

    run_dir = RunDir.existing(args.run_dir)
    step, rows = ledger.read(run_dir)
    if not rows.num_rows:
        cure = "continue training with training.pair_ledger=true"
        raise UserError(
            "RUN_DIR", args.run_dir, f"has no record of its pairs up to step {step}", cure
        )
    found = insight.findings(step, rows)
    try:
        texts = raw_rows(load_spec(run_dir.config).data, "train", found.shown(args.top))
    except UserError as error:  # for example the data moved; the numbers are still printed
        print(f"texts are not available: {error}", file=sys.stderr)
        texts = {}
    if args.json:
        print(json.dumps(insight.as_json(found, args.top, texts)))
    else:
        print("\n".join(insight.lines(found, args.top, texts)))
    return DONE


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from orchestrator.training.export import export as write
    from orchestrator.training.prepare import quiet
    from orchestrator.training.rundir import RunDir

    quiet()
    print(
        "model: "
        f"{write(RunDir.existing(args.run_dir), Path(args.out), args.dtype, which=args.checkpoint)}"
    )
    return DONE


def _spec(args: argparse.Namespace) -> RunSpec:
    files, overrides = files_and_overrides(args.settings)
    spec = load_spec(files, overrides)
    if (
        len(files) == 1
        and os.path.isdir(files[0])
        and not any(word.startswith("run.") for word in overrides)
    ):
        _check_not_moved(files[0], spec)
    return spec


def _check_not_moved(folder: str, spec: RunSpec) -> None:
    """Check that a run directory is where its settings say."""
    if os.path.realpath(folder) != os.path.realpath(spec.run_dir):
        path = Path(folder).absolute()
        rule = f"contains the settings of a run in {spec.run_dir}: it was moved or copied"
        raise UserError("RUN_DIR", folder, rule, f"add run.dir={path.parent} run.name={path.name}")


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        if name == "notes":
            continue
        for entry in value if isinstance(value, list) and isinstance(value[0], dict) else [value]:
            text = (
                ", ".join(f"{key} {each}" for key, each in entry.items())
                if isinstance(entry, dict)
                else entry
            )
            print(f"{name:<{width}}  {text}")
    for line in facts["notes"]:
        print(f"note: {line}")


def _say_how_it_ended(spec: RunSpec, result: "RunResult") -> int:
    if result.status == "stopped":
        print(
            f"stopped after step {result.step} ({result.reason}) and saved; the same command "
            "resumes"
        )
        return STOPPED
    from orchestrator.insight.summary import summary

    print("\n" + "\n".join(summary(spec, result)))
    return DONE


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    verb.__name__: verb
    for verb in (train, debug, plan, submit, doctor, stop, verify, pairs, export)
}


if __name__ == "__main__":
    sys.exit(main())
