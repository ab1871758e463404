"""Code of a user's, named as module:attr: how it is found, and the one line that a run ends with where it raises."""

import hashlib
import traceback
from bdb import BdbQuit
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from orchestrator.settings.spec import UserError

NOT_OF_THE_CODE = (BdbQuit, OSError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What a user's code may raise that is no fault of it: who debugs it has quit, or the machine has failed, which
another attempt may not meet."""
MEND = "mend it, and give the same command again"


def raised_by_user(key: str, name: str, error: Exception, where: str, cure: str = MEND) -> UserError:
    """The line that ends a run in which a user's code has raised. To be called where it was called."""
    called = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
    places = [f"{Path(frame.filename).name} line {frame.lineno}" for frame in called[:1]]
    reason = f"raised {type(error).__name__}: {error} ({'; '.join([*places, where])})"
    return UserError(key, name, reason, cure)


def called(key: str, name: str, where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a user's function returns.

    Raises:
        UserError: it raised what is a fault of its own.
    """
    try:
        return function(*args, **kwargs)
    except NOT_OF_THE_CODE:
        raise
    except Exception as error:
        raise raised_by_user(key, name, error, where) from error


def user_attribute(key: str, path: str) -> Any:
    """The object that a user's module:attr names.

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
            "give the command in the folder that holds the module, or install it",
        ) from None
    except Exception as error:
        raise raised_by_user(key, path, error, "when imported") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(key, path, f"module {name} has no {attribute}", "check the name after the colon") from None


def source_hash(path: str) -> str:
    """Of the file that holds a user's module:attr, which can be imported."""
    file = getattr(import_module(path.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
