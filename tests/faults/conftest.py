"""Record rows of the fault table: a fault, its outcome, and the seconds until the run went on."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

TABLE = "FAULT_TABLE"  # environment variable: the file that rows are appended to


class FaultRow(Protocol):
    """Record that a fault had an outcome; tests/faults/table.py counts equal rows.

    group: the kind of fault ("killed in a save"). fault: what was injected, and where.
    outcome: what the run did, in the words of the table.
    seconds: from the fault until the run went on, or had ended as stated; default: since the test
        began.
    """

    def __call__(
        self, group: str, fault: str, outcome: str, seconds: float | None = None
    ) -> None: ...


@pytest.fixture
def fault_row(request: pytest.FixtureRequest) -> Iterator[FaultRow]:
    """Append to the file of the environment variable FAULT_TABLE once the test has passed."""
    began, rows = time.monotonic(), list[dict[str, object]]()

    def add(group: str, fault: str, outcome: str, seconds: float | None = None) -> None:
        took = time.monotonic() - began if seconds is None else seconds
        rows.append({"group": group, "fault": fault, "outcome": outcome, "seconds": round(took, 1)})

    failed = request.session.testsfailed
    yield add
    path = os.environ.get(TABLE)
    if path and request.session.testsfailed == failed:
        with Path(path).open("a") as file:  # one write: workers append at the same time
            file.write("".join(f"{json.dumps(row)}\n" for row in rows))
