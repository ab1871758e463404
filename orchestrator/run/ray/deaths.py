"""Summarise in one line which worker of a Ray Train run died, why, and which log to read."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten

KEPT = 300  # characters of a reason
RAYS_NAMES = re.compile(r"\s(class_name|actor_id|namespace|pid|ip): \S*")
PROCESS_GONE = "its worker process has died"  # a long message of Ray without further information


def gone_ranks(error: Exception | None) -> dict[int, str | None]:
    """Return the ranks whose process Ray Train has lost; how they ended is not known."""
    failures = _failures(error).items()
    return {rank: None for rank, failure in failures if hasattr(failure, "health_check_failure")}


def is_out_of_memory(error: Exception | None) -> bool:
    """Return whether Ray's memory monitor ended a worker."""
    return any("memory monitor" in str(each) for each in [error, *_failures(error).values()])


def reason_of_death(error: Exception | None, log_of: Callable[[int], Path]) -> str:
    """Return the rank that died first, a short reason, and its log.

    error: exception of TorchTrainer.fit. A rank whose process is gone comes before ranks that
    raised, as these usually lost their connection to it.
    """
    failures = _failures(error)
    if not failures:
        return _in_short(str(error))
    rank = min(gone_ranks(error) or failures)
    return f"rank {rank}: {_in_short(str(failures[rank]))}; its log is {log_of(rank)}"


def _failures(error: Exception | None) -> Mapping[int, Exception]:
    """Return what Ray Train reports of each rank that failed."""
    return getattr(error, "worker_failures", None) or {}


def _in_short(text: str) -> str:
    """Return a message of Ray shortened to one line."""
    if PROCESS_GONE in text:
        return "its process is gone: killed by a signal, out of memory, or crashed"
    return shorten(RAYS_NAMES.sub("", " ".join(text.split())), KEPT, placeholder=" ...")
