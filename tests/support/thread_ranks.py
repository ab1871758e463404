"""Ranks that are threads of the test's process."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from orchestrator.world import World
from support.timeouts import scaled_timeout


class LeftAlone(Exception):
    """A rank waited for another one that had ended: in a real run it would wait until the
    collective times out.
    """


class Meeting:
    """Where the ranks of a ThreadWorld meet."""

    def __init__(self, size: int) -> None:
        self.size, self.changed = size, threading.Condition()
        self.rounds: dict[int, dict[int, Any]] = {}
        self.ended: set[int] = set()

    def exchange(self, rank: int, number: int, value: Any) -> list[Any]:
        """The values of all ranks in a round."""
        with self.changed:
            values = self.rounds.setdefault(number, {})
            values[rank] = value
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: len(values) == self.size or self.ended - values.keys(),
                timeout=scaled_timeout(60),
            )
            if len(values) < self.size:
                raise LeftAlone
            return [values[other] for other in range(self.size)]

    def end(self, rank: int) -> None:
        """This rank comes to no further round."""
        with self.changed:
            self.ended.add(rank)
            self.changed.notify_all()


@dataclass(frozen=True)
class ThreadWorld(World):
    """One of several ranks that are threads of this process, with the collectives of a World but
    `max`.
    """

    meeting: Meeting = field(kw_only=True)
    rounds: Iterator[int] = field(kw_only=True, default_factory=count)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, next(self.rounds), value)

    def collect(self, values: torch.Tensor) -> list[torch.Tensor]:
        everyone = self.gather(values.clone())
        return everyone if self.is_main else []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(torch.stack(self.gather(values.clone())).sum(0))


def on_ranks(size: int, run: Callable[[World], Any]) -> list[Any]:
    """Call `run(world)` on every rank; what each returned or raised: LeftAlone where it waited in
    vain.
    """
    meeting, results = Meeting(size), [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = run(ThreadWorld(rank, size, rank, torch.device("cpu"), meeting=meeting))
        except Exception as error:
            results[rank] = error
        finally:
            meeting.end(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
