"""Import user code named as module:attr, and turn its exceptions into one-line errors."""

import hashlib
import traceback
from bdb import BdbQuit
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from orchestrator.settings.errors import UserError, type_and_message
from orchestrator.user_time import USER_TIME

NOT_OF_THE_CODE = (BdbQuit, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Exceptions from user code that are not its fault: a quit debugger, or a machine failure, which a
retry may avoid.
"""
FIX_IT = "fix it, and run the same command again"


def raised_by_user(
    key: str, name: str, error: Exception, where: str, cure: str = FIX_IT
) -> UserError:
    """Return the error for an exception in user code; call it in the frame that called the user
    code.
    """
    called = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)[1:]
        if "importlib" not in frame.filename
    ]
    places = [f"{Path(frame.filename).name} line {frame.lineno}" for frame in called[:1]]
    reason = f"raised {type_and_message(error)} ({'; '.join([*places, where])})"
    return UserError(key, name, reason, cure)


def call_user_code(
    key: str, name: str, where: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a user's function and return its result.

    Raises:
        UserError: the function raised an exception that is its own fault.
    """
    try:
        with USER_TIME.of(name):
            return function(*args, **kwargs)
    except NOT_OF_THE_CODE:
        raise
    except Exception as error:
        raise raised_by_user(key, name, error, where) from error


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
    except Exception as error:
        raise raised_by_user(key, path, error, "when imported") from error
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
