"""Clusters that cannot hold the workers are refused."""

import os
from pathlib import Path

import pytest

from support.refusals import (
    RAY_LIMIT_S,
    Refusal,
    Run,
    UserInput,
    assert_refused,
    run_in_process,
    write_input,
)


def test_more_workers_than_cores_are_refused_before_ray_starts(
    tmp_path: Path, run_here: Run
) -> None:
    write_input(tmp_path, UserInput())
    cores = os.cpu_count()
    code, _, stderr = run_here("train", "run.yaml", "cluster.num_workers=1000")
    rule = f"1 CPU each, but this machine has {cores} CPUs"
    assert_refused(
        code,
        stderr,
        Refusal("cluster.num_workers", "1000", rule, f"set cluster.num_workers={cores}"),
    )
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


def test_a_request_for_no_resources_is_refused(tmp_path: Path, run_here: Run) -> None:
    write_input(tmp_path, UserInput())
    code, _, stderr = run_here("train", "run.yaml", "cluster.resources.CPU=0")
    assert_refused(
        code,
        stderr,
        Refusal("cluster.resources", "{'CPU': 0.0}", "requests no resources", "{CPU: 1}"),
    )


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_refused(tmp_path: Path, shared_ray: dict[str, str]) -> None:
    write_input(tmp_path, UserInput())
    words = ("train", "run.yaml", "cluster.resources.GPU=64")
    code, _, stderr = run_in_process(tmp_path, *words, limit=RAY_LIMIT_S, env=shared_ray)
    rule = "workers need 64 GPU each, placed PACK, but the nodes of the cluster can hold"
    assert_refused(
        code, stderr, Refusal("cluster.num_workers", "1", rule, "lower cluster.resources")
    )
