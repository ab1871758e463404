"""The loss scale moves as torch's GradScaler does."""

import pytest
import torch

from orchestrator.engines.scale import LossScale


@pytest.mark.parametrize("overflows", [set(), {0}, {2, 3}, {1, 5, 6, 11}], ids=str)
def test_the_loss_scale_changes_as_torchs_grad_scaler(overflows: set[int]) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    expected, actual = torch.amp.GradScaler("cpu", growth_interval=3), LossScale(enabled=True)
    actual.growth_interval = 3
    for step in range(14):
        parameter.grad = torch.full((1,), float("inf") if step in overflows else 1.0)
        expected.scale(torch.zeros(1))
        expected.unscale_(optimizer)
        expected.step(optimizer)
        expected.update()
        actual.update(applied=step not in overflows)
        assert actual.value == expected.get_scale()


def test_only_fp16_has_a_loss_scale() -> None:
    actual, loss = LossScale(enabled=False), torch.tensor(3.0)
    actual.update(applied=False)
    actual.set_state({"value": 4.0, "good_steps": 2})  # of a run that was in fp16
    assert actual.scaled(loss) is loss
    assert (actual.value, actual.state()) == (1.0, {})
