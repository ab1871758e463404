"""The end of an attempt decides the next one: deaths count since the last new commit."""

import pytest

from orchestrator.run.supervise import BACKOFF_S, Attempt, Next, Supervisor


@pytest.mark.parametrize(
    ("max_failures", "attempts", "expected"),
    [
        (3, [("ended", 10)], ["done"]),
        (3, [("refused", -1)], ["refuse"]),
        (3, [("failed", 10)], ["give up"]),
        (0, [("died", -1)], ["give up"]),
        (0, [("died", 10)], ["give up"]),
        (2, [("died", -1)] * 3, ["retry", "retry", "give up"]),
        (1, [("died", -1), ("ended", 5)], ["retry", "done"]),
        (1, [("died", -1), ("failed", 5)], ["retry", "give up"]),
        (1, [("died", -1), ("died", 5), ("died", 5)], ["retry", "retry", "give up"]),
        (1, [("died", 5), ("died", 6), ("died", 7), ("died", 8)], ["retry"] * 4),
        (
            2,
            [("died", 5), ("died", 5), ("died", 6), ("died", 6), ("died", 6)],
            ["retry"] * 4 + ["give up"],
        ),
        # an older checkpoint than before (the newest was corrupt) is no progress
        (1, [("died", 6), ("died", 5)], ["retry", "give up"]),
        (1, [("died", 6), ("died", 0)], ["retry", "give up"]),
        # the checkpoint of step 0 is one
        (1, [("died", -1), ("died", 0), ("died", 0)], ["retry", "retry", "give up"]),
    ],
)
def test_outcomes_decide_whether_a_run_restarts(
    max_failures: int, attempts: list[tuple[str, int]], expected: list[Next]
) -> None:
    supervisor = Supervisor(max_failures)
    actual = [supervisor.after(Attempt(outcome, newest_step)) for outcome, newest_step in attempts]
    assert actual == expected


def test_waiting_grows_with_deaths_in_a_row_and_starts_over() -> None:
    supervisor = Supervisor(9)
    waited = []
    for newest_step in (-1, -1, -1, -1, 5, 5):
        supervisor.after(Attempt("died", newest_step))
        waited.append(supervisor.backoff_s)
    assert waited == [*BACKOFF_S, BACKOFF_S[-1], *BACKOFF_S[:2]]
    assert list(BACKOFF_S) == sorted(BACKOFF_S)


@pytest.mark.parametrize(
    ("attempts", "step"),
    [
        ([(10, 12), (10, 12)], 12),
        ([(10, 12), (10, 13)], None),
        ([(10, 12), (15, 12)], None),  # a new checkpoint is progress
        ([(-1, None), (-1, None)], None),  # before the first step
    ],
)
def test_a_run_that_dies_twice_at_one_step_is_given_up(
    attempts: list[tuple[int, int | None]], step: int | None
) -> None:
    supervisor = Supervisor(9)
    actions = [supervisor.after(Attempt("died", newest, at)) for newest, at in attempts]
    assert (actions[-1], supervisor.died_twice_at) == ("give up" if step else "retry", step)
