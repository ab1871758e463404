"""The interval of checkpoint.every=auto."""

import pytest

from orchestrator.training import save_interval
from orchestrator.training.attempts import Attempt
from orchestrator.training.save_interval import (
    SaveInterval,
    explained,
    hours_between_failures,
    seconds_between_saves,
)


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "seconds"),
    [
        (2.0, 10_000.0, 200.0),  # sqrt(2 x 2 x 10000)
        (2.0, 1e9, 3600.0),  # at most an hour
        (2.0, 10.0, 20.0),  # at least 10 costs
        (600.0, 1e9, 6000.0),  # also if that is more than an hour
    ],
)
def test_youngs_interval_within_its_bounds(cost_s: float, mtbf_s: float, seconds: float) -> None:
    assert seconds_between_saves(cost_s, mtbf_s) == pytest.approx(seconds)


def test_hours_and_failures_of_the_run_correct_the_assumed_rate() -> None:
    assert hours_between_failures(1000, nodes=4) == 250
    assert hours_between_failures(1000, nodes=1, failures=0, node_hours=1000) == 2000
    assert hours_between_failures(1000, nodes=2, failures=9, node_hours=1000) == 100


def test_the_arithmetic_is_shown() -> None:
    assert explained(2.0, 10_000 / 3600) == (
        "3.33 min = sqrt(2 x 2 s for a save x 2.78 h between failures)"
    )
    assert explained(30, 1000).startswith("1 h = ")
    assert explained(30, 1000).endswith(", at most 1 h")
    assert explained(30, 0.001).endswith(", at least 10 times a save")


def test_the_first_save_is_due_at_once_and_the_next_after_the_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(save_interval.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(save_interval.time, "time", lambda: 7200.0)
    killed, stopped = Attempt(0, 3600, 1, 1), Attempt(3600, 7200, 1, 1, end="stopped")
    interval = SaveInterval(2.0, [killed, stopped, Attempt(7200, 7200, 1, 1)])
    assert interval.is_due()
    interval.saved(1.0)
    # (2 + 2 hours) / (1 + 1 failure)
    assert interval.seconds == pytest.approx((2 * 1.0 * 2 * 3600) ** 0.5)
    now[0] += interval.seconds - 1
    assert not interval.is_due()
    now[0] += 1
    assert interval.is_due()
    interval.saved(1.0)  # the same: not printed again
    interval.saved(9.0)
    assert interval.cost_s == 5.0
    assert [line.split(" = ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "a checkpoint every 2 min",
        "a checkpoint every 4.47 min",
    ]
