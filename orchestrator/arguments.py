"""Parse the command line: verbs, flags, settings files and overrides."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NoReturn, get_args

from orchestrator import __version__
from orchestrator.mistyped import Verbs, is_file, wrong_flag, wrong_help, wrong_verb, wrong_word
from orchestrator.settings.catalogue import described
from orchestrator.settings.checkpoint import Exported
from orchestrator.settings.errors import UserError


def parse(words: Sequence[str], launchers: Sequence[str]) -> argparse.Namespace:
    """Parse the words; `verb` of the result is the verb's name.

    Help is printed here and ends the process. launchers: where `submit` can send a run.

    Unlike with plain argparse, settings may precede and follow flags, and may follow a --profile
    without a range.

    Raises:
        UserError: a word is neither a verb nor a flag.
        SystemExit: after printing help or the version, or for a wrong value of a flag.
    """
    parser, verbs = _parser(launchers)
    words = list(words)
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if words[0] == "help":
        _print_help(words[1:], parser, verbs)
        raise SystemExit(0)
    if words[0] not in verbs and not words[0].startswith("-"):
        raise wrong_verb(words[0], verbs)
    for at, (word, following) in enumerate(pairwise([*words, ""])):
        if word == "--profile" and not re.fullmatch(r"\d+(:\d+)?", following):
            words[at] = "--profile="
    args, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise wrong_flag(words, unknown[0], verbs)
    if rest and not hasattr(args, "settings"):
        fix = f"see orchestrator help {args.verb}"
        raise UserError(args.verb, " ".join(rest), "is an unexpected argument", fix)
    if rest:
        args.settings += rest
    return args


def files_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the settings files and the key=value words.

    Raises:
        UserError: a word is neither, or there is no file.
    """
    for at, (before, word) in enumerate(pairwise(["", *words])):
        key, equals, _ = word.partition("=")
        if not key or not (equals or is_file(word)):
            raise wrong_word(before, word, words[at + 1 :])
    files = [word for word in words if "=" not in word]
    if not files:
        fix = "for example orchestrator train configs/quickstart.yaml"
        raise UserError("FILE", None, "a settings file is required", fix)
    return files, [word for word in words if "=" in word]


def check_flags(args: argparse.Namespace) -> None:
    """Check that the flags of `debug` do not contradict each other.

    Raises:
        UserError: two of them do.
    """
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
            rule = f"cannot be combined with {other}"
            raise UserError(flag, value, rule, f"remove {other} or {flag}")


def debug_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of `debug` that are passed to each rank."""
    values = {"--pdb": args.pdb, "--overfit": args.overfit, "--dry-run": args.dry_run}
    flags = [flag for flag, is_set in values.items() if is_set]
    if args.profile is not None:
        flags.append("--profile=" + ":".join(map(str, args.profile)))
    return flags


def _print_help(words: Sequence[str], parser: argparse.ArgumentParser, verbs: Verbs) -> None:
    """Print help on the program, a verb, all settings, a block or a setting."""
    if not words:
        parser.print_help()
    elif words[0] in verbs:
        verbs[words[0]].print_help()
    elif lines := described("" if words[0] == "settings" else words[0]):
        print("\n".join(lines))
    else:
        raise wrong_help(words[0], verbs)


class _Parser(argparse.ArgumentParser):
    """ArgumentParser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parser(
    launchers: Sequence[str],
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser, and the parsers of verbs by name."""
    parser = _Parser(
        prog="orchestrator",
        description="Distributed preference training from one YAML file.",
        epilog="orchestrator help settings lists all settings; orchestrator help optimizer lists "
        "those of a block.",
    )
    parser.add_argument("--version", action="version", version=f"orchestrator {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    verbs: dict[str, argparse.ArgumentParser] = {}

    def add(verb: str, description: str) -> argparse.ArgumentParser:
        verbs[verb] = subparsers.add_parser(verb, help=description, description=description)
        verbs[verb].set_defaults(verb=verb)
        return verbs[verb]

    _add_verbs_of_settings(add, launchers)
    _add_verbs_of_runs(add)
    return parser, verbs


Add = Callable[[str, str], argparse.ArgumentParser]


def _add_verbs_of_settings(add: Add, launchers: Sequence[str]) -> None:
    """Add the verbs with settings files and overrides as arguments."""
    _takes_settings(add("train", "train on Ray: a local instance, or the cluster at RAY_ADDRESS"))
    debug = add("debug", "train in this process, without Ray; breakpoints work")
    _takes_settings(debug)
    _add_debug_flags(debug)
    plan = add("plan", "check settings, data and models, and print what the run would do")
    _takes_settings(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    lengths = "the lengths of all rows; tokenises the data"
    show = f"print the first N training rows as the model sees them, and {lengths}"
    rows = _integer_from_1("a number of rows, 1 or more")
    plan.add_argument("--show-rows", type=rows, metavar="N", help=show)
    clusters = "a Ray cluster's job server or to Slurm"
    submit = add("submit", f"check the run here, then submit it to {clusters}")
    _takes_settings(submit)
    _add_submit_flags(submit, launchers)
    nodes = "every node of the cluster at RAY_ADDRESS, or this machine"
    doctor = add("doctor", f"check {nodes}, as before a run")
    without = "settings of the run to check; without them, only the checks that need no settings"
    doctor.add_argument("settings", nargs="*", metavar="FILE|key=value", help=without)


def _add_submit_flags(submit: argparse.ArgumentParser, launchers: Sequence[str]) -> None:
    submit.add_argument("--to", choices=launchers, help="where to submit the run")
    server = "Ray's job server (http://HEAD:8265); default: RAY_API_SERVER_ADDRESS"
    submit.add_argument("--address", metavar="URL", help=server)
    no_wait = "Ray: do not follow the log until the run exits"
    submit.add_argument("--no-wait", dest="wait", action="store_false", help=no_wait)


def _takes_settings(verb: argparse.ArgumentParser) -> None:
    files = "YAML files or a run directory, merged from left to right, then overrides"
    verb.add_argument("settings", nargs="*", metavar="FILE|key=value", help=files)


def _add_verbs_of_runs(add: Add) -> None:
    """Add the verbs with a run directory as argument."""
    stop = add("stop", "save and stop a run; the command that started it resumes it")
    stop.add_argument("run_dir", metavar="RUN_DIR")
    checks = "check every file of all checkpoints and of the pair ledger against its manifest"
    verify = add("verify", checks)
    verify.add_argument("run_dir", metavar="RUN_DIR")
    again = "also replay the steps between the two newest checkpoints, and compare every tensor"
    verify.add_argument("--replay", action="store_true", help=again)
    which = "which pairs a run never learned, which look mislabelled"
    pairs = add("pairs", f"show {which}, and the effect of length")
    pairs.add_argument("run_dir", metavar="RUN_DIR")
    number, top = _integer_from_1("a number of pairs"), "pairs to show of each kind"
    pairs.add_argument("--top", type=number, default=5, metavar="N", help=top)
    pairs.add_argument("--json", action="store_true", help="print one JSON object, with full texts")
    export = add("export", "write a checkpoint as a Hugging Face model folder")
    export.add_argument("run_dir", metavar="RUN_DIR")
    export.add_argument("out", metavar="OUT")
    which = "last: the newest complete checkpoint; best: the best one; default: checkpoint.export"
    export.add_argument("--checkpoint", choices=get_args(Exported), help=which)
    dtypes, what = ("fp32", "bf16", "fp16"), "type of the written weights"
    export.add_argument("--dtype", choices=dtypes, default="fp32", help=what)


def _add_debug_flags(debug: argparse.ArgumentParser) -> None:
    ranks = _integer_from_1("a number of processes, 1 or more")
    nproc = "number of ranks, one process each"
    debug.add_argument("--nproc", type=ranks, default=1, metavar="N", help=nproc)
    pdb = "start a debugger when an exception is raised"
    debug.add_argument("--pdb", action="store_true", help=pdb)
    overfit = "overfit the first global batch; keep nothing"
    debug.add_argument("--overfit", action="store_true", help=overfit)
    dry_run = "build everything and run one forward and backward pass; keep nothing"
    debug.add_argument("--dry-run", action="store_true", help=dry_run)
    trace = "write a trace of these steps (default 3:5) to RUN_DIR/profile"
    debug.add_argument("--profile", type=_step_range, nargs="?", metavar="FIRST:LAST", help=trace)
    step = _integer_from_1("a step, counted from 1")
    replay = "replay step N of the run whose directory is FILE, and print every pair"
    debug.add_argument("--replay-step", type=step, metavar="N", help=replay)


def _integer_from_1(what: str) -> Callable[[str], int]:
    """Return a parser of integers of 1 or more. what: a description of the number for errors."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return read


def _step_range(text: str) -> tuple[int, ...]:
    """Parse FIRST:LAST or FIRST; nothing is an empty range."""
    ends = [int(end) if end.isdecimal() else 0 for end in text.split(":") if text]
    if len(ends) > 2 or 0 in ends or ends != sorted(ends):
        rule = "is not a range of steps, counted from 1; for example 3:5"
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return tuple(ends)
