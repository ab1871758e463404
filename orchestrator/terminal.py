"""Prepare stdout and stderr for terminals that are not UTF-8 and for pipes whose reader has gone."""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

READER_GONE = 141  # what a shell reports of a program that a closed pipe has ended: 128 + SIGPIPE
PLAIN_SYMBOLS = "plain_symbols"  # the name of the error handler
# What `plan --show-rows` prints, for an encoding that does not have it.
FALLBACKS = {"⟦": "[[", "⟧": "]]", "⟨": "<", "⟩": ">", "⏎": "\\n", "␣": "_"}
FALLBACKS |= {bar: str(height) for height, bar in enumerate("▁▂▃▄▅▆▇█", 1)}


def prepare(keeps_going: bool) -> None:
    """Replace the standard streams of this process by ones that no symbol and no closed pipe can break.

    keeps_going: a reader that has gone ends the output only; otherwise it ends the process, as it does any other.
    """
    codecs.register_error(PLAIN_SYMBOLS, _plain_symbols)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us; print() then does nothing
            continue
        raw = io.BufferedWriter(_Output(stream.fileno(), keeps_going))
        prepared = io.TextIOWrapper(
            raw, stream.encoding, PLAIN_SYMBOLS, line_buffering=True, write_through=stream.write_through
        )
        setattr(sys, name, prepared)


def flush() -> None:
    """Write what is still in the buffers, while it can be noticed that a reader has gone.

    Raises:
        OSError: it cannot be written, for one because the disk is full.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                _discard(stream.fileno())  # else the interpreter tries again when it ends
                raise


def _discard(descriptor: int) -> None:
    """Have the output of a stream go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _plain_symbols(error: UnicodeError) -> tuple[str, int]:
    """Handle letters that an encoding does not have: a symbol's fallback, or the letter's escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = [FALLBACKS.get(each) or each.encode("ascii", "backslashreplace").decode() for each in letters]
    return "".join(plain), error.end


class _Output(io.FileIO):
    """A standard stream whose reader may go away."""

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
            raise SystemExit(READER_GONE)
        if self.fileno() == 1:
            with suppress(OSError):
                os.write(2, b"stdout was closed; the run goes on, and its metrics are in the run directory\n")
        return len(data)
