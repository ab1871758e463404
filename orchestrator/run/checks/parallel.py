"""Run functions side by side and wait for them with a time-out, whatever a file system does."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from textwrap import shorten
from typing import Any


def side_by_side(functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Run functions in parallel; return each result, or its exception.

    It is TimeoutError for a function that is not done in time. A function that hangs stays in a
    daemon thread, which does not keep the process from exiting.
    """
    return results_of({key: in_thread(call) for key, call in functions.items()}, seconds)


def failures(functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, str]:
    """Run functions in parallel; return the errors of those that failed."""
    results = side_by_side(functions, seconds)
    return {key: one_line(error) for key, error in results.items() if isinstance(error, Exception)}


def results_of(futures: "Mapping[str, Future[Any]]", seconds: float) -> dict[str, Any]:
    """Wait for futures; return each result, or its exception: TimeoutError if it is not done."""
    wait(futures.values(), seconds)
    late = TimeoutError(f"no answer within {seconds:.0f} s")
    return {
        key: (future.exception() or future.result()) if future.done() else late
        for key, future in futures.items()
    }


def in_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Run a function in a daemon thread: at exit, the interpreter would wait for an executor."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def one_line(error: Exception) -> str:
    """Return a short text for an exception."""
    # Ray's wrapper includes the traceback of the other process
    error = getattr(error, "cause", None) or error
    reason = error.strerror if isinstance(error, OSError) else None
    return shorten(reason or str(error) or type(error).__name__, 200, placeholder=" ...")
