"""Name the user code that runs in this process, and count the seconds that it takes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class UserTime:
    """The user function or callback that runs now, and the seconds of each and of all so far.

    Only the thread that trains writes it; the watchdog's thread reads it.
    """

    def __init__(self) -> None:
        self.running: str | None = None
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time of the block for the user code of that name."""
        outer, began = self.running, time.monotonic()
        self.running = name
        try:
            yield
        finally:
            self.running, took = outer, time.monotonic() - began
            self.seconds[name] += took
            if outer is None:
                self.total += took


USER_TIME = UserTime()
"""That of this process, which runs user code in one thread."""
