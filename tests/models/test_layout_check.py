"""The check at start measures what a packed row would change."""

from typing import Any

import pytest
import torch

from orchestrator.models import kernels
from orchestrator.models.attention import (
    CHECKED,
    LAYOUT,
    use_packed_attention,
)
from orchestrator.models.layout_check import packed_error
from orchestrator.settings.model import AttentionName
from orchestrator.training.layout import PACKED_TOLERANCE
from support.attention_models import CPU, layers, random_model, twin


@pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
@pytest.mark.parametrize("kind", CHECKED)
def test_packed_error_is_rounding(kind: str, kernel: AttentionName) -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        model = twin(random_model(kind, dtype, 0))
        use_packed_attention(model, kernel)
        assert packed_error(model, CPU) < most


@pytest.mark.parametrize("kind", CHECKED)
def test_packed_error_shows_attention_that_ignores_the_layout(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_sequence(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _: Any,
        scale: float | None,
        __: bool,
    ) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setitem(kernels.KERNELS, "cpu", one_sequence)
    model = twin(random_model(kind, torch.float32, 0))
    use_packed_attention(model, "cpu")
    assert packed_error(model, CPU) > max(PACKED_TOLERANCE.values())


def test_packed_error_shows_a_layout_that_is_dropped_on_its_way() -> None:
    """As an architecture would whose layers hand only the keywords on that they know."""
    model = twin(random_model("qwen2", torch.float32, 0))
    use_packed_attention(model, "cpu")
    for layer in layers(model):
        layer.register_forward_pre_hook(
            lambda _, inputs, options: (inputs, {k: v for k, v in options.items() if k != LAYOUT}),
            with_kwargs=True,
        )
    assert packed_error(model, CPU) > max(PACKED_TOLERANCE.values())
