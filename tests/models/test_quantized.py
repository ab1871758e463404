"""int8 layers compute the same product on every CPU."""

import os
import subprocess
import sys

import torch

from orchestrator.models.quantized import _int8_product
from support.timeouts import scaled_timeout

WITHOUT_AVX512 = """
import bitsandbytes, torch
from orchestrator.models.quantized import exact_int8_products
for _ in range(2):  # of each run in a process
    exact_int8_products()
left = torch.full((3, 64), 127, dtype=torch.int8)
right = torch.full((5, 64), -127, dtype=torch.int8)
with torch.autocast("cpu", torch.float16):
    product = torch.ops.bitsandbytes.int8_linear_matmul(left, right)
assert (product == -64 * 127**2).all(), product
"""


def test_int8_products_are_exact_under_autocast_on_a_cpu_without_avx512() -> None:
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", WITHOUT_AVX512]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=scaled_timeout(120), check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_int8_product_is_that_of_integers() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-127, 128, (rows, 1000), generator=draw, dtype=torch.int8) for rows in (7, 9)
    )
    expected = (left.long() @ right.long().T).int()
    assert torch.equal(_int8_product(left, right), expected)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert torch.equal(_int8_product(left, right), expected)
