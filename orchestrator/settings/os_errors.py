"""Turn errors of the file system that a user can fix into a UserError with the setting's key."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from orchestrator.settings.errors import UserError, message_of

FIXABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
}
"""Not those of a failing disk or network, after which the same command may succeed."""
FREE_SPACE = "free space there, or use another folder"
FIX_PATH = "fix that path, or its permissions"


def read_regular(path: Path) -> str:
    """Return the UTF-8 text of a regular file: reading a pipe would wait for its writer.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        UnicodeDecodeError: it is not UTF-8 text.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path.read_text(encoding="utf-8")


def _fixable(error: OSError) -> bool:
    """Return whether a user can fix it. numpy's error of a full disk has no number."""
    return error.errno is None or error.errno in FIXABLE


def _os_error(key: str, value: str, error: OSError) -> UserError:
    """Return the error for a setting whose file or folder cannot be used."""
    reason = error.strerror or message_of(error)
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    where = f": {file[:200]}" * bool(file and file != value)
    is_full = error.errno in (None, errno.ENOSPC, errno.EDQUOT)
    cure = FREE_SPACE if is_full else FIX_PATH
    return UserError(key, value, f"cannot be used ({reason}{where})", cure)


def _key_of(error: OSError, paths: Mapping[str, str]) -> str | None:
    """Return the key of the innermost path that contains the file of an error, or None."""
    if not isinstance(error.filename, str | bytes):
        return None
    file = os.path.abspath(os.fsdecode(error.filename))
    around = [
        (len(path), key)
        for key, path in paths.items()
        if f"{file}/".startswith(f"{os.path.abspath(path).rstrip('/')}/")
    ]
    return max(around)[1] if around else None


@contextmanager
def os_errors(paths: Mapping[str, str], default: str | None = None) -> Iterator[None]:
    """Name the setting whose path the block cannot use, where a user can fix that.

    paths: those of settings, by their keys. default: the key for an error elsewhere or without a
    file, as writing has; None: such an error is raised as it is.

    Raises:
        UserError: such an error was raised.
    """
    try:
        yield
    except OSError as error:
        key = _key_of(error, paths) or default
        if key is None or not _fixable(error):
            raise
        raise _os_error(key, paths[key], error) from error
