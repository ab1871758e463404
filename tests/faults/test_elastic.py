"""An elastic run takes the workers that there is room for, when it starts, goes on or runs; its
numbers stay.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.debug_runs import finish_debug
from support.run_files import losses, metric_lines
from support.timeouts import scaled_timeout
from support.tiny_settings import write_settings

# two epochs of 32 pairs; after which steps the run goes on with other workers
STEPS, STOPS, GROWS = (8, 3, 5)

CALLBACKS = """
import time
from pathlib import Path
from transformers import TrainerCallback

class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            Path(args.output_dir, "STOP").touch()

class Waits(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        while state.global_step == 5 and not Path(args.output_dir, "STOP").exists():
            time.sleep(0.05)
"""
# A Ray of two CPUs that others use as well: each line that comes takes a CPU, or frees it again.
SHARED_RAY = """
import sys, ray
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
)
print(ray.get_runtime_context().gcs_address, flush=True)
taken = None
for _ in sys.stdin:
    if taken is None:
        taken = ray.util.placement_group([{"CPU": 1}])
        assert taken.wait(60)
    else:
        ray.util.remove_placement_group(taken)
    print("done", flush=True)
"""
TRAIN = """
import sys
from orchestrator import cli
from orchestrator.run.ray import elastic
elastic.GROWTH_WAIT_S = 0
sys.exit(cli.main(sys.argv[1:]))
"""


@contextmanager
def started(
    code: str, *words: str | Path, cwd: Path, **env: str
) -> Iterator[subprocess.Popen[str]]:
    """Python code in a process that is ended after all, if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **env},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # by which Ray ends what it has started
            try:
                process.communicate(timeout=scaled_timeout(20))
            except subprocess.TimeoutExpired:
                process.kill()


def print_workers(ray: Any) -> None:
    """Have the shared Ray take its CPU, or free it."""
    ray.stdin.write("\n")
    ray.stdin.flush()
    assert ray.stdout.readline() == "done\n"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_run_continues_with_the_workers_that_fit(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CALLBACKS)
    settings = write_settings(
        tmp_path,
        data={"eval": None},
        training={"max_steps": STEPS, "logging_steps": 1},
        cluster={"num_workers": [1, 2]},
        optimizer={"lr": 3e-3},
    )
    finish_debug(settings, "run.name=undisturbed", ranks=2)
    # by another engine, whose shards go on at another number of ranks
    zero = ["engine.kind=deepspeed", "engine.zero_stage=3"]
    run_dir, words = tmp_path / "runs" / "elastic", ["train", settings, "run.name=elastic", *zero]
    with started(SHARED_RAY, cwd=tmp_path) as ray:
        assert ray.stdout is not None
        there = {"cwd": tmp_path, "RAY_ADDRESS": ray.stdout.readline().strip()}
        with started(TRAIN, *words, "callbacks=[mine:Stops]", **there) as process:
            out, errors = process.communicate(timeout=scaled_timeout(240))
        assert process.returncode == 3, errors
        assert "workers: 2 (cluster.num_workers = [1, 2])" in out
        assert max(losses(run_dir)) == STOPS

        print_workers(ray)
        with started(TRAIN, *words, "callbacks=[mine:Waits]", **there) as process:
            waits_for_step(STOPS + 1, run_dir, process)
            print_workers(ray)
            out, errors = process.communicate(timeout=scaled_timeout(240))
        assert process.returncode == 0, errors
        ray.communicate(timeout=scaled_timeout(60))
    shrunk = ["workers: 1 (cluster.num_workers = [1, 2])", f"resumed after step {STOPS}"]
    grown = [
        "workers: room for 2; saving, to resume with them",
        "workers: 2 (cluster.num_workers = [1, 2])",
        f"resumed after step {GROWS}",
    ]
    values = [line for line in out.splitlines() if "workers:" in line or "resumed" in line]
    assert values == shrunk + grown
    assert errors == ""  # nothing has died

    undisturbed = losses(tmp_path / "runs" / "undisturbed")
    # each once, and so each pair
    assert [line["step"] for line in metric_lines(run_dir)] == [*range(1, STEPS + 1)]
    assert losses(run_dir) == pytest.approx(undisturbed, abs=1e-5)
    # so that a step lost, or taken twice, would be seen
    assert undisturbed[STEPS] < undisturbed[1] - 0.05


def waits_for_step(step: int, run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until the run, which this process drives, has taken it."""
    deadline = time.monotonic() + scaled_timeout(240)
    while max(losses(run_dir)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
