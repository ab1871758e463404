"""A billion parameters train a step by ZeRO-3 on two ranks of a machine with 24 GB and no GPU;
prints the peak memory.

bash launch/test.sh -m slow -s tests/contract/test_large.py
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from support.run_files import losses
from support.timeouts import scaled_timeout
from support.tiny_settings import random_rows, write_jsonl

LIMIT = 24e9  # bytes
MODEL = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 15,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
ZERO = {  # at most a tenth of the model gathered at a time, and few elements updated
    "stage": 3,
    "sub_group_size": 2 * 10**7,
    "stage3_max_live_parameters": 10**8,
    "stage3_max_reuse_distance": 10**8,
    "stage3_prefetch_bucket_size": 10**7,
}


def private_bytes(process: psutil.Process) -> int:
    """Memory of this process and all below it that is no file's: pages of mapped weights can be
    dropped.
    """
    resident = 0
    for one in (process, *process.children(recursive=True)):
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:  # it has ended
            continue
        resident += sum(
            1024 * int(kilobytes) for kilobytes in re.findall(r"RssAnon:\s+(\d+)", status)
        )
    return resident


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_billion_parameters_train_a_step_in_24_gb(tmp_path: Path) -> None:
    if psutil.virtual_memory().available < 22 * 2**30:
        pytest.skip("wants 22 GiB of free memory")
    settings = {
        "run": {"name": "billion", "dir": str(tmp_path / "runs")},
        "model": {"init": {"model_type": "qwen2", "vocab_size": 300, "config": MODEL}},
        "data": {"train": str(write_jsonl(tmp_path / "train.jsonl", random_rows(2)))},
        "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-5},
        "training": {"max_steps": 1, "logging_steps": 1},
        "precision": "bf16",
        "engine": {
            "kind": "deepspeed",
            "offload": "parameters",
            "deepspeed_config": {
                "zero_optimization": ZERO,
                "data_types": {"grad_accum_dtype": "bf16"},
            },
        },
        # by the policy as it starts: no second model in memory
        "reference": {"kind": "precomputed"},
        "wandb": {"mode": "disabled"},
    }
    path = tmp_path / "billion.yaml"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "orchestrator.cli", "debug", str(path), "--nproc", "2"]
    # what is freed goes back to the system: glibc would keep what was smaller than 32 MB
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**env, "MALLOC_ARENA_MAX": "2"}
        )
    peak, over = [0], threading.Event()

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while not over.wait(0.2):
            peak[0] = max(peak[0], private_bytes(watched))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        code = process.wait(timeout=scaled_timeout(1100))
    finally:
        over.set()
        watcher.join()
        process.kill()
    output = log.read_text()
    assert code == 0, output
    [count] = re.findall(r"([\d,]+) trainable parameters", output)
    seconds = time.monotonic() - began
    print(
        f"\n{count} parameters, AdamW, bf16 over fp32: peak {peak[0] / 1e9:.1f} GB in "
        f"{seconds:.0f} s"
    )
    assert int(count.replace(",", "")) > 1e9
    assert losses(tmp_path / "runs" / "billion") == {1: pytest.approx(math.log(2), abs=1e-6)}
    assert peak[0] < LIMIT
