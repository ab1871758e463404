"""DeepSpeed: what it refuses on a device is one line."""

from types import SimpleNamespace

import pytest
import torch

from orchestrator.engines import deepspeed
from orchestrator.settings.errors import UserError


def test_fp16_is_refused_on_a_gpu_for_which_deepspeed_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100")
    gpu, accelerator = torch.device("cuda", 0), SimpleNamespace(is_fp16_supported=lambda: False)
    refusal = (
        "precision = 'fp16': DeepSpeed does not support fp16 on Tesla P100; set "
        "precision=fp32, or engine.kind=ddp"
    )
    with pytest.raises(UserError, match=refusal):
        deepspeed._check_precision("fp16", gpu, accelerator)
    for precision in ("fp32", "bf16"):
        deepspeed._check_precision(precision, gpu, accelerator)
