"""Start as many workers as fit now, and save the run to resume with more when more fit."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from orchestrator.run.ray import capacity
from orchestrator.run.ray.cluster import is_joined
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir

GROWTH_WAIT_S = 30.0  # seconds in which further nodes may join before an elastic run uses the first
FREE_PLACEMENTS = ("PACK", "SPREAD")  # strategies under which one more worker may be on any node


def count_workers(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """Return how many workers to start: for an elastic run as many as fit now.

    In an existing cluster this may wait: up to wait_s seconds for nodes, and without limit for
    resources that others hold.

    Raises:
        UserError: the cluster cannot hold the fewest workers: Ray would wait forever.
        StoppedWaiting: run_dir has the file STOP.
    """
    cluster = spec.cluster
    count = min(capacity.wait_for_capacity(spec, wait_s, run_dir), cluster.max_workers)
    # under other strategies, workers cannot be placed one by one
    if is_joined() and cluster.placement in FREE_PLACEMENTS:
        count = _wait_for_places(spec, wait_s, run_dir)
    if cluster.min_workers < cluster.max_workers:
        print(f"workers: {count} (cluster.num_workers = {cluster.num_workers})", flush=True)
    return count


def _wait_for_places(spec: RunSpec, wait_s: float, run_dir: RunDir | None) -> int:
    """Wait until the workers can be placed, or the fewest after CLUSTER_WAIT_S; return how many."""
    fewest, most = spec.cluster.min_workers, spec.cluster.max_workers
    began, printed = time.monotonic(), False
    with requested_places(spec, most) as granted:
        while (count := granted()) < most:
            if time.monotonic() > began + capacity.CLUSTER_WAIT_S:
                if count >= fewest:
                    break
                if not printed:
                    printed = True
                    placed = f"workers: {count} of {fewest} are placed"
                    print(f"{placed}; waiting for the others", flush=True)
                capacity.check_no_stop(run_dir)
                # Ray notices a lost node only after a while
                capacity.wait_for_capacity(spec, wait_s, run_dir)
            time.sleep(capacity.POLL_S)
    return count


@contextmanager
def requested_places(spec: RunSpec, count: int) -> Iterator[Callable[[], int]]:
    """Request places for `count` more workers from Ray; yield a function that counts granted ones.

    Granted places are free and on live nodes, which the resources that nodes report do not show.
    """
    from ray.util import placement_group, placement_group_table, remove_placement_group

    groups = [placement_group([capacity.worker_resources(spec)]) for _ in range(count)]
    try:
        yield lambda: sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def save_when_more_fit(
    spec: RunSpec, run_dir: RunDir, workers: int, training: threading.Thread
) -> None:
    """Wait until more workers fit or training ends; in the first case save the run, to resume.

    Ray's own elasticity would kill the workers without a save, and would count resources of other
    programs as free.
    """
    if spec.cluster.placement not in FREE_PLACEMENTS:
        return
    # the run's own workers are placed first
    while training.is_alive() and not run_dir.heartbeat(0).exists():
        training.join(capacity.POLL_S)
    with requested_places(spec, spec.cluster.max_workers - workers) as granted:
        room, since = 0, time.monotonic()
        while training.is_alive():
            training.join(5 * capacity.POLL_S)
            if (now := granted()) != room:
                room, since = now, time.monotonic()
            elif room and time.monotonic() - since > GROWTH_WAIT_S and not run_dir.stop.exists():
                more = f"workers: room for {workers + room}"
                print(f"{more}; saving, to resume with them", flush=True)
                request_growth(run_dir)


def request_growth(run_dir: RunDir) -> None:
    """Request a stop that is not a user's: the time of the file STOP is 0."""
    with suppress(FileExistsError), open(run_dir.stop, "x") as file:  # keep a user's request
        os.utime(file.fileno(), (0, 0))


def is_growth_request(run_dir: RunDir) -> bool:
    """Return whether the driver itself requested the stop; a user's, even a touch, sets a time."""
    return run_dir.stop.exists() and run_dir.stop.stat().st_mtime == 0
