"""End workers of Ray Train that do not respond: Ray itself would wait for minutes."""

import os
import signal
from contextlib import suppress
from pathlib import Path

from orchestrator.run.ray import capacity
from orchestrator.training.heartbeat import Observed


def kill_ranks(line: str, ranks: list[Observed]) -> None:
    """Kill the processes of these ranks on their nodes, after which Ray ends the attempt."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeManagerHostname"]: node["NodeID"] for node in capacity.live_nodes()}
    kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
    for beat in (each.beat for each in ranks):
        if beat.host in nodes:  # else its node is lost, too
            there = NodeAffinitySchedulingStrategy(nodes[beat.host], soft=False)
            kill.options(scheduling_strategy=there).remote(beat.pid)


def _kill(pid: int) -> None:
    """Kill a worker of Ray; another process may have its number by now."""
    with suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
