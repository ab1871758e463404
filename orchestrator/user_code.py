"""Import user code named as module:attr, and turn its exceptions into one-line errors."""

import hashlib
from bdb import BdbQuit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from orchestrator.settings.errors import (
    MachineError,
    TrainingError,
    UserError,
    exit_error,
    place_in_user_code,
    type_and_message,
)
from orchestrator.user_time import USER_TIME

MACHINE_FAILURES = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Exceptions from user code that may not be its fault: a retry may avoid them."""
NOT_OF_THE_CODE = (BdbQuit, UserError, TrainingError, MachineError)
"""Exceptions that pass through user code: a quit debugger, and ours."""
FIX_IT = "fix it, and run the same command again"
RESUMES = "the same command continues from the last checkpoint"


def error_of_user_code(
    key: str, name: str, error: Exception | SystemExit, where: str, cure: str = FIX_IT
) -> UserError | MachineError | TrainingError:
    """Return the error for an exception in user code: it is the code's fault, or the machine's, or
    the code ended the process.
    """
    if isinstance(error, SystemExit):
        return exit_error(error, f"{key} = {name!r}:", where)
    places = filter(None, (place_in_user_code(error), where))
    reason = f"raised {type_and_message(error)} ({'; '.join(places)})"
    if isinstance(error, MACHINE_FAILURES):
        return MachineError(f"{key} = {name!r}: {reason}; {RESUMES}")
    return UserError(key, name, reason, cure)


@contextmanager
def user_code(key: str, name: str, where: str, cure: str = FIX_IT) -> Iterator[None]:
    """Name the user code that the block runs: in its errors, and while it runs.

    Raises:
        UserError: it raised an exception that is its own fault.
        MachineError: it raised one that may be the machine's.
        TrainingError: it called sys.exit.
    """
    try:
        with USER_TIME.of(name):
            yield
    except NOT_OF_THE_CODE:
        raise
    except (Exception, SystemExit) as error:
        raise error_of_user_code(key, name, error, where, cure) from error


def call_user_code(
    key: str, name: str, where: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a user's function and return its result; raises the errors of `user_code`."""
    with user_code(key, name, where):
        return function(*args, **kwargs)


@contextmanager
def exit_is_error() -> Iterator[None]:
    """Turn sys.exit in code that the block runs into an error that names the function.

    Raises:
        TrainingError: the code called sys.exit.
    """
    try:
        yield
    except SystemExit as error:
        raise exit_error(error) from error


def user_attribute(key: str, path: str) -> Any:
    """Import and return the object that module:attr names.

    Raises:
        UserError: the module cannot be imported, or has no such attribute.
    """
    name, _, attribute = path.partition(":")
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(
            key,
            path,
            f"cannot be imported ({error})",
            "run the command in the folder of the module, or install it",
        ) from None
    except (Exception, SystemExit) as error:
        raise error_of_user_code(key, path, error, "when imported") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(
            key, path, f"module {name} has no {attribute}", "check the name after the colon"
        ) from None


def source_hash(path: str) -> str:
    """Return the hash of the file that defines a user's module:attr, which must be importable."""
    file = getattr(import_module(path.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
