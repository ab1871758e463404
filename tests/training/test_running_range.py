"""A number far outside the range of the steps before is noticed once per incident."""

import random

import pytest

from orchestrator.training.running_range import QUIET, RunningRanges


def remarks(losses: list[float], grad_norm: float = 1.0) -> list[int]:
    """Return the steps, counted from 1, whose loss is remarked on."""
    ranges = RunningRanges()
    return [step for step, loss in enumerate(losses, 1) if ranges.add(step, loss, grad_norm)]


def noisy(level: float, count: int, spread: float = 0.3) -> list[float]:
    draw = random.Random(0)
    return [level * draw.lognormvariate(0.0, spread) for _ in range(count)]


def test_a_healthy_run_is_not_remarked_on() -> None:
    assert remarks([0.69, *noisy(0.6, 200), *noisy(0.3, 200), *noisy(0.01, 200, spread=1.5)]) == []


@pytest.mark.parametrize("first", [0.69, 25.0, -0.5])
def test_an_explosion_in_the_second_step_is_remarked_on_once(first: float) -> None:
    assert remarks([first, 1e9, 1e12, 3.0, 1e8]) == [2]


@pytest.mark.parametrize("level", [0.69, 30.0, 1e-4])
def test_a_spike_is_remarked_on_again_only_after_a_quiet_time(level: float) -> None:
    quiet = noisy(level, QUIET + 1)
    assert remarks([0.69, *noisy(level, 30), 1e3, *quiet[:9], 1e3, *quiet, 1e3]) == [32, 63 + 1]


def test_a_gradient_norm_is_remarked_on_with_both_values() -> None:
    ranges = RunningRanges()
    assert ranges.add(1, 0.69, 2.0) is None
    line = ranges.add(2, 0.69, 1e4)
    assert line == (
        "loss 0.69 (running median 0.69), gradient norm 1e+04 (running median 2, far outside its "
        "range)"
    )


def test_a_resumed_run_remarks_on_the_same_steps() -> None:
    numbers = [0.69, *noisy(0.5, 40), 1e3, *noisy(0.5, 40), 1e4]
    for cut in (0, 1, 10, 41, 42, 60):
        ranges, steps = RunningRanges(), list[int]()
        for step, loss in enumerate(numbers, 1):
            if step == cut + 1:
                state, ranges = ranges.state(), RunningRanges()
                ranges.restore(state)
            if ranges.add(step, loss, 1.0):
                steps.append(step)
        assert steps == remarks(numbers)
