"""Implement the verbs of the command line: each calls one function and prints the outcome.

A verb imports inside its function what loads torch, ray, numpy or pyarrow, which take seconds: help
and refused settings need none of them.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator import early_signals, terminal
from orchestrator.arguments import check_flags, debug_flags, files_and_overrides, parse
from orchestrator.data.sources import raw_rows
from orchestrator.insight.summary import summary
from orchestrator.processes import PARENT
from orchestrator.settings import errors
from orchestrator.settings.counts import counted
from orchestrator.settings.errors import DONE, FAILED, STOPPED, WRONG, UserError
from orchestrator.settings.load import ALL_PATH_KEYS, SettingsSource, load_spec, paths_in
from orchestrator.settings.os_errors import os_errors
from orchestrator.settings.run import RunSpec
from orchestrator.training import manifest
from orchestrator.training.result import RunResult, finished_already, finished_line, last_result
from orchestrator.training.rundir import RunDir


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    It is 0 for done, 2 for wrong settings or data, 3 for stopped and resumable, 1 for all else.
    Without argv, the words are those of sys.argv, and the standard streams of the process are
    prepared.
    """
    if argv is not None:
        return _run_verb(argv)
    words = sys.argv[1:]
    is_run = words[:1] in (["train"], ["debug"])
    terminal.prepare(keeps_going=is_run)
    if is_run:
        _stop_early()
    try:
        code = _run_verb(words)
    except early_signals.StoppedEarly as stopped:
        _print_error(str(stopped))
        os._exit(STOPPED)  # the interpreter's end could wait for threads of torch or Ray
    try:
        terminal.flush()
    except OSError as error:  # a full disk
        if code == DONE:
            print(f"error: {error}", file=sys.stderr)
        return code or FAILED
    return code


def _stop_early() -> None:
    """Install handlers for signals before the run begins; a rank leaves them to its parent, which
    recognises a rank that ended by a signal.
    """
    if PARENT not in os.environ:
        early_signals.install()
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run_verb(words: Sequence[str]) -> int:
    try:
        args = parse(words, tuple(LAUNCHERS))
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        # to import the user's callbacks and collators, as `python -m` does
        sys.path.insert(0, os.getcwd())
        return _call_verb(args)
    except UserError as error:
        _print_error(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}")
        return WRONG
    except KeyboardInterrupt:
        _print_error("aborted")
        return FAILED
    except (errors.MachineError, errors.UserCodeExited) as error:  # of one rank
        _print_error(f"error: {' '.join(str(error).split())}")
        return FAILED
    except (errors.TrainingError, errors.RunDied) as error:
        from orchestrator.world import is_first_process

        if is_first_process():  # the same error is raised on every rank
            _print_error(f"error: {' '.join(str(error).split())}")
        return FAILED
    except (OSError, MemoryError) as error:
        _print_error(f"error: {errors.with_place(error)}")
        return FAILED


def _call_verb(args: argparse.Namespace) -> int:
    """Call a verb; user code that exits, and paths that a user can fix, are named in its errors."""
    words = {"RUN_DIR": getattr(args, "run_dir", None), "OUT": getattr(args, "out", None)}
    args.paths = {key: path for key, path in words.items() if path is not None}
    with os_errors(args.paths):
        try:
            return VERBS[args.verb](args)
        except terminal.ReaderGone:
            raise
        except SystemExit as error:
            raise errors.exit_error(error) from error


def _print_error(line: str) -> None:
    """Write a line to stderr in one call: ranks share it, and print writes the end separately."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# --- train and debug ------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """Train on Ray."""
    spec = _spec(args)
    if (done := _print_if_finished(spec)) is not None:
        return _print_end(spec, done)
    from orchestrator.run.ray import driver

    return _print_end(spec, driver.train(spec))


def debug(args: argparse.Namespace) -> int:
    """Train in this process without Ray, or examine a step."""
    check_flags(args)
    keeps_run = not (args.overfit or args.dry_run)
    if args.replay_step is not None or not keeps_run:
        early_signals.leave()  # nothing to stop and start again
    if args.replay_step is not None:
        return _replay(args)
    spec = _spec(args)
    from orchestrator.world import is_one_of_many

    is_rank = is_one_of_many()
    only_trains = keeps_run and args.profile is None and not is_rank
    if only_trains and (done := _print_if_finished(spec)) is not None:
        return _print_end(spec, done)
    if args.nproc > 1 and not is_rank:
        return _debug_ranks(args, spec, keeps_run)
    if not keeps_run:
        from orchestrator.run.local import trial

        (trial.overfit if args.overfit else trial.dry_run)(spec, post_mortem=args.pdb)
        return DONE
    from orchestrator.run.local import debug as local

    result = local.run_here(spec, post_mortem=args.pdb, profile=args.profile)
    if is_rank:  # the process that started this rank prints the outcome
        return STOPPED if result.status == "stopped" else DONE
    return _print_end(spec, result)


def _debug_ranks(args: argparse.Namespace, spec: RunSpec, keeps_run: bool) -> int:
    """Run the same command as several ranks of this machine."""
    from orchestrator.run.local.ranks import start_ranks

    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "debug",
        *args.settings,
        *debug_flags(args),
    ]
    code = start_ranks(spec, args.nproc, command, args.profile, keeps_run)
    if not keeps_run or code not in (DONE, STOPPED):
        return code
    if (result := last_result(RunDir(spec.run_dir))) is None:
        raise errors.UserCodeExited("the ranks ended without a result: user code called os._exit")
    return _print_end(spec, result)


def _print_if_finished(spec: RunSpec) -> RunResult | None:
    """Print and return the result of a run that has finished already; None for other runs."""
    run_dir = RunDir(spec.run_dir)
    done = finished_already(run_dir)
    if done is not None:
        run_dir.check(spec)
        print(finished_line(run_dir), flush=True)
    return done


def _replay(args: argparse.Namespace) -> int:
    folders, overrides = files_and_overrides(args.settings)
    if len(folders) != 1:
        rule = "exactly one run can be replayed"
        raise UserError("RUN_DIR", " ".join(folders), rule, "use the folder run.dir/run.name")
    from orchestrator.run.local.replay import replay, replay_lines

    replayed = replay(RunDir.existing(folders[0]), args.replay_step, overrides, args.pdb)
    print("\n".join(replay_lines(replayed)))
    return DONE


# --- before a run ---------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> int:
    """Print what a run would do, without starting it."""
    spec = _spec(args)
    facts = _planned(spec)
    if not args.json:
        _print_facts(facts)
    if args.show_rows:
        from orchestrator.run import rows

        if args.json:
            facts |= rows.as_json(spec, args.show_rows)
        else:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print()
            for line in rows.as_lines(spec, args.show_rows, colour):
                print(line, flush=True)
    if args.json:
        print(json.dumps(facts))
    return DONE


def submit(args: argparse.Namespace) -> int:
    """Check the run here and submit it to a cluster."""
    if args.to is None:
        flags = " or ".join(f"--to {name}" for name in LAUNCHERS)
        raise UserError("--to", None, "is required", f"write {flags}")
    return LAUNCHERS[args.to](args)


def _submit_to_ray(args: argparse.Namespace) -> int:
    spec = _spec(args)
    from orchestrator.run.facts import Outlook, row_counts, run_facts
    from orchestrator.run.ray.submit import not_on_this_machine, submit_job

    if elsewhere := not_on_this_machine(spec):
        print(f"{elsewhere} is not on this machine: its rows are checked where the run starts")
    else:
        _print_facts(run_facts(spec, Outlook(row_counts(spec))))
    return submit_job(spec, args.address, args.wait)


def _submit_to_slurm(args: argparse.Namespace) -> int:
    if args.address or not args.wait:
        flag = "--address" if args.address else "--no-wait"
        rule = f"{flag} applies only to a Ray cluster's job server"
        raise UserError("--to", "slurm", rule, f"remove {flag}, or write --to ray")
    spec = _spec(args)
    from orchestrator.run.slurm import submit_job

    _print_facts(_planned(spec, starts_here=False))
    return submit_job(spec)


LAUNCHERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "ray": _submit_to_ray,
    "slurm": _submit_to_slurm,
}
"""Where `submit` can send a run."""


def _planned(spec: RunSpec, starts_here: bool = True) -> dict[str, Any]:
    """Check the start of a run and return facts about it, as `planned` does."""
    from orchestrator.run.facts import check_names

    check_names(spec)  # before torch is loaded: a wrong name is refused at once
    from orchestrator.run.plan import planned

    return planned(spec, starts_here)


def doctor(args: argparse.Namespace) -> int:
    """Check every node that would train."""
    spec = _spec(args) if args.settings else None
    from orchestrator.run.checks.report import refusal, table
    from orchestrator.run.ray.node_checks import check_all_nodes

    checks = check_all_nodes(spec)
    print(table(checks))
    return WRONG if refusal(checks) else DONE


def _spec(args: argparse.Namespace) -> RunSpec:
    files, overrides = files_and_overrides(args.settings)
    spec = load_spec([_source(file) for file in files], overrides)
    args.paths |= paths_in(spec, ALL_PATH_KEYS)
    is_run_dir = len(files) == 1 and os.path.isdir(files[0])
    if is_run_dir and not any(word.startswith("run.") for word in overrides):
        _check_not_moved(files[0], spec)
    return spec


def _source(file: str) -> SettingsSource:
    """Return the settings of a run directory, or the path of any other file or folder."""
    run_dir = RunDir(Path(file))
    return run_dir.settings() if os.path.isdir(run_dir.checkpoints) else file


def _check_not_moved(folder: str, spec: RunSpec) -> None:
    """Check that a run directory is where its settings say."""
    if os.path.realpath(folder) != os.path.realpath(spec.run_dir):
        path = Path(folder).absolute()
        rule = f"contains the settings of a run in {spec.run_dir}: it was moved or copied"
        raise UserError("RUN_DIR", folder, rule, f"add run.dir={path.parent} run.name={path.name}")


# --- runs that exist ------------------------------------------------------------------------------


def stop(args: argparse.Namespace) -> int:
    """Signal a run, on any machine, to save and stop."""
    run_dir = RunDir(Path(args.run_dir))
    if (owner := run_dir.owner()) is None:
        print(f"{RunDir.existing(args.run_dir).path} is not running")
        return DONE
    run_dir.stop.write_text("orchestrator stop")
    print(f"signalled {owner}: it saves after the last finished step and exits with code {STOPPED}")
    return DONE


def verify(args: argparse.Namespace) -> int:
    """Check every file of all checkpoints, of the pair ledger and of the run."""
    from orchestrator.training import ledger
    from orchestrator.training.damage import damage

    if args.replay:
        from orchestrator.run.local.interval import replay_on_this_rank

        if replay_on_this_rank():
            return DONE
    run_dir = RunDir.existing(args.run_dir)
    folders = manifest.committed(run_dir.checkpoints)
    problems: dict[str, list[str]] = {}
    for folder in folders:
        try:
            problems[folder.name] = manifest.verify(folder)
        except (UserError, OSError) as error:  # of this checkpoint; the others are still checked
            problems[folder.name] = [str(error)]
        print(f"{folder.name}: {'; '.join(problems[folder.name]) or 'complete'}")
    if (in_ledger := ledger.verify(run_dir)) is not None:
        problems[run_dir.pairs.name] = in_ledger
        print(f"{run_dir.pairs.name}: {'; '.join(in_ledger) or 'complete'}")
    problems["other files"] = damage(run_dir)
    for line in problems["other files"]:
        print(line)
    if not folders:
        print("no checkpoint")
    complete = [folder for folder in folders if not problems[folder.name]]
    is_replayed = not args.replay or (bool(complete) and _replay_interval(run_dir, complete))
    return DONE if folders and is_replayed and not any(problems.values()) else FAILED


def _replay_interval(run_dir: RunDir, complete: list[Path]) -> bool:
    """Replay the steps before the newest checkpoint; print and return whether they are the same."""
    from orchestrator.run.local.interval import SHOWN, certify

    command = [sys.executable, "-m", "orchestrator.cli", "verify", str(run_dir.path), "--replay"]
    print(f"replaying the steps before {complete[0].name}", flush=True)
    steps, ranks, differences, machines = certify(run_dir, complete, command)
    where = f"{steps}, replayed on {counted(ranks, 'rank')}"
    if not differences:
        print(f"{where}: end with bitwise the state of {complete[0].name}")
        return True
    print(f"{where}: {counted(len(differences), 'difference')} from {complete[0].name}{machines}")
    for line in differences[:SHOWN]:
        print(f"  {line}")
    if len(differences) > SHOWN:
        print(f"  and {len(differences) - SHOWN} more")
    return False


def pairs(args: argparse.Namespace) -> int:
    """Print how each pair was learned."""
    from orchestrator.insight import pairs as insight
    from orchestrator.training import ledger

    run_dir = RunDir.existing(args.run_dir)
    step, rows = ledger.read(run_dir)
    if not rows.num_rows:
        rule = f"has no record of its pairs up to step {step}"
        cure = "continue training with training.pair_ledger=true"
        raise UserError("RUN_DIR", args.run_dir, rule, cure)
    findings = insight.analyse(step, rows)
    try:
        texts = raw_rows(load_spec(run_dir.settings()).data, "train", findings.first_ids(args.top))
    except UserError as error:  # for example the data moved; the numbers are still printed
        print(f"texts are not available: {error}", file=sys.stderr)
        texts = {}
    if args.json:
        print(json.dumps(insight.as_json(findings, args.top, texts)))
    else:
        print("\n".join(insight.as_lines(findings, args.top, texts)))
    return DONE


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint as a Hugging Face folder."""
    from orchestrator.training.export import export as export_model
    from orchestrator.training.prepare import quiet

    quiet()
    run_dir, out = RunDir.existing(args.run_dir), Path(args.out)
    print(f"model: {export_model(run_dir, out, args.dtype, which=args.checkpoint)}")
    return DONE


# --- output ---------------------------------------------------------------------------------------


def _print_facts(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        if name == "notes":
            continue
        for entry in value if isinstance(value, list) and isinstance(value[0], dict) else [value]:
            if isinstance(entry, dict):
                entry = ", ".join(f"{key} {each}" for key, each in entry.items())
            print(f"{name:<{width}}  {entry}")
    for line in facts["notes"]:
        print(f"note: {line}")


def _print_end(spec: RunSpec, result: RunResult) -> int:
    """Print how a run ended and return the exit code."""
    if result.status == "stopped":
        how = f"stopped after step {result.step} ({result.reason})"
        how += " and saved" if result.checkpoint else ""
        print(f"{how}; the same command resumes")
        return STOPPED
    print("\n" + "\n".join(summary(spec, result)))
    return DONE


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    verb.__name__: verb
    for verb in (train, debug, plan, submit, doctor, stop, verify, pairs, export)
}


if __name__ == "__main__":
    sys.exit(main())
