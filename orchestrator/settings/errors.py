"""The errors that end a run, each printed as one line (cli.py turns them into exit codes)."""

import sysconfig
import traceback
from pathlib import Path
from typing import Any

DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 3  # exit codes; stopped: saved, and can resume
PACKAGE = str(Path(__file__).parents[1])
NOT_THE_USERS = (
    PACKAGE,
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    "<frozen",
)
"""How the paths of code begin that is not a user's."""
LONGEST_MESSAGE = 300  # characters of an exception's message in one of our lines


def message_of(error: BaseException) -> str:
    """Return the message of an exception on one line, shortened."""
    message = " ".join(str(error).split())
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."


def type_and_message(error: BaseException) -> str:
    """Return the type and the message of an exception on one line."""
    return ": ".join(filter(None, (type(error).__name__, message_of(error))))


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the first frame of a user's code in the traceback of an exception, or None."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)), None)


def place_in_user_code(error: BaseException) -> str:
    """Return the file and line of `user_frame`; empty without one."""
    frame = user_frame(error)
    return f"{Path(frame.filename).name} line {frame.lineno}" if frame else ""


def with_place(error: BaseException) -> str:
    """Return the message of an exception; with its type and place if user code raised it."""
    place = place_in_user_code(error)
    message = f"{type_and_message(error)} ({place})" if place else str(error)
    return message or type(error).__name__


class UserError(Exception):
    """Error of the user's input, printed as one line with key, value, rule and fix. Exit code 2.

    `key` is a setting ("batch.micro_batch_size") or a place in the data ("pairs.jsonl row 17").
    """

    def __init__(self, key: str, value: object, rule: str, cure: str) -> None:
        # all four are args, because errors are pickled between processes
        super().__init__(key, value, rule, cure)
        self.key, self.value, self.rule, self.cure = key, value, rule, cure

    def __str__(self) -> str:
        value = "(not set)" if self.value is None else _representation(self.value)
        if len(value) > 120:
            value = value[:117] + "..."
        return " ".join(f"{self.key} = {value}: {self.rule}; {self.cure}".split())


def _representation(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # nested too deeply, too many digits, or a user's object
        return f"a {type(value).__name__}"


class SettingsError(UserError):
    """One or more settings are wrong; `str` gives one line for each."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(errors[0].key, errors[0].value, errors[0].rule, errors[0].cure)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors,)


class TrainingError(Exception):
    """Error of a training that cannot continue, the same on every rank: one line with step and
    fix. Exit code 1.
    """


class MachineError(Exception):
    """Error of the machine (memory, disk, network) in user code, in one line with its place.

    Exit code 1 without Ray; under Ray the run resumes, as after any other death of a worker.
    """


class UserCodeExited(TrainingError):
    """Error of a rank whose user code called sys.exit; other ranks may not have it."""


def exit_error(error: SystemExit, name: str = "", where: str = "") -> UserCodeExited:
    """Return the error for user code that ended the process, whatever its exit code.

    name: the user code, its function if not set.
    """
    frame = user_frame(error)
    name = name or (f"{frame.name}()" if frame else "the run's code")
    places = ", ".join(filter(None, (place_in_user_code(error), where)))
    called = f"called sys.exit({error.code!r})" + f" ({places})" * bool(places)
    return UserCodeExited(f"{name} {called}: that is a failure; raise an exception that says why")


class StopRequested(Exception):
    """Signal that work ends early because the run should stop; its text is the reason."""


class RunDied(Exception):
    """Error: workers died more often than cluster.max_failures allows, without a new checkpoint,
    or no usable nodes were left after a death.

    Exit code 1.
    """
