"""Prepare stdout and stderr for terminals without UTF-8 and for closed pipes."""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

READER_GONE = 141  # a shell's exit code for a program ended by a closed pipe: 128 + SIGPIPE
PLAIN_SYMBOLS = "plain_symbols"  # the name of the error handler
# Symbols of `plan --show-rows`, for encodings that lack them.
FALLBACKS = {"⟦": "[[", "⟧": "]]", "⟨": "<", "⟩": ">", "⏎": "\\n", "␣": "_"}
FALLBACKS |= {bar: str(height) for height, bar in enumerate("▁▂▃▄▅▆▇█", 1)}


class ReaderGone(SystemExit):
    """End of a verb whose reader has closed the pipe."""


def prepare(keeps_going: bool) -> None:
    """Make the standard streams of this process survive unknown symbols and closed pipes.

    keeps_going: True: a closed pipe ends only the output; False: it ends the process, as usual.
    """
    codecs.register_error(PLAIN_SYMBOLS, plain_symbols)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process; print() then does nothing
            continue
        raw = io.BufferedWriter(_Output(stream.fileno(), keeps_going))
        prepared = io.TextIOWrapper(
            raw,
            stream.encoding,
            PLAIN_SYMBOLS,
            line_buffering=True,
            write_through=stream.write_through,
        )
        setattr(sys, name, prepared)


def flush() -> None:
    """Flush the buffers, so that errors are raised here and not when the interpreter exits.

    Raises:
        OSError: writing failed, for example because the disk is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                _discard(stream.fileno())  # else the interpreter tries again at exit
                raise


def _discard(descriptor: int) -> None:
    """Redirect a stream to the null device."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def plain_symbols(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding lacks by a fallback or an escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = [
        FALLBACKS.get(each) or each.encode("ascii", "backslashreplace").decode() for each in letters
    ]
    return "".join(plain), error.end


class _Output(io.FileIO):
    """Standard stream whose reader may close it."""

    def __init__(self, descriptor: int, keeps_going: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._keeps_going = keeps_going

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that was closed
                raise
        _discard(self.fileno())
        if not self._keeps_going:
            raise ReaderGone(READER_GONE)
        if self.fileno() == 1:
            with suppress(OSError):
                os.write(
                    2,
                    b"stdout was closed; the run continues, and its metrics are in the run "
                    b"directory\n",
                )
        return len(data)
