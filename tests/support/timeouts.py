"""Waiting times of tests for what must happen: longer on a busy machine."""

import os

SLACK = 2.0  # load rises after a wait has begun


def slowdown() -> float:
    """Return how many times slower than idle this machine is: the processes that each core is
    shared by.

    TEST_TIME_SCALE overrides it, for a machine whose load does not show (a container beside
    others).
    """
    if scale := os.environ.get("TEST_TIME_SCALE"):
        return float(scale)
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def scaled_timeout(seconds: float) -> float:
    """Return how long to wait for what takes at most so many seconds on an idle machine.

    For what must happen: a wait that ends by its time-out is a failure, so a long one costs a
    passing test nothing. Never for a time-out of the product that a test expects to fire.
    """
    return seconds * SLACK * slowdown()
