"""A precision is refused where the device has none of it; TF32 is on for its own alone, and what
was set comes back.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from orchestrator.engines.precision import dtype_held, resolved, tf32_switched
from orchestrator.models.dtypes import dtype_name
from orchestrator.settings.errors import UserError
from orchestrator.settings.precision import Precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_bf16_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved("auto", CPU) == "fp32"
    for has, expected in ((True, "bf16"), (False, "fp32")):
        # torch says that it is supported where it is emulated, unless it is asked not to
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has
        )
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        assert resolved("auto", GPU) == expected
    assert resolved("fp16", GPU) == "fp16"
    for requests in ("bf16", "tf32"):
        with pytest.raises(UserError, match=r"Tesla T4 does not support .* set precision=fp"):
            resolved(requests, GPU)


@pytest.mark.parametrize("requested", ["bf16", "fp16", "fp32", "fp64"])
def test_a_cpu_has_all_but_tf32(requested: Precision) -> None:
    assert resolved(requested, CPU) == requested
    with pytest.raises(
        UserError, match=r"precision = 'tf32': a CPU does not support TF32; set precision=fp32"
    ):
        resolved("tf32", CPU)


def test_weights_are_named_as_in_the_settings() -> None:
    assert [dtype_name(dtype_held(precision)) for precision in ("tf32", "bf16", "fp64")] == [
        "fp32",
        "fp32",
        "fp64",
    ]
    assert dtype_name(torch.bfloat16) == "bf16"


def switches() -> list[Any]:
    """All that torch has for it, by both of its sets of names."""
    cuda, cudnn, host = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    new: list[Any] = [cuda.matmul, cudnn.conv, cudnn.rnn, host.matmul]
    values: list[Any] = [each.fp32_precision for each in new]
    for old in (
        torch.get_float32_matmul_precision,
        lambda: cuda.matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
    ):
        try:
            values.append(old())
        except RuntimeError as error:
            values.append(type(error))
    return values


def by_the_old_name() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def in_16_bits_on_the_host() -> None:
    torch.set_float32_matmul_precision("medium")


def as_transformers_does() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def unset() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        each.fp32_precision = "none"


@pytest.mark.parametrize(
    "before", [lambda: None, by_the_old_name, in_16_bits_on_the_host, as_transformers_does]
)
def test_tf32_is_switched_whatever_was_set_which_comes_back(
    unset: None, before: Callable[[], None]
) -> None:
    before()
    was = switches()
    for on, inside in (
        (True, ["tf32"] * 4 + ["high", True, True]),
        (False, ["ieee"] * 4 + ["highest", False, False]),
    ):
        with tf32_switched(on):
            assert switches() == inside
        assert [old for old, new in zip(was, switches(), strict=True) if old != new] in (
            [],
            2 * [RuntimeError],
        )
