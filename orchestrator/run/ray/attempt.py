"""One attempt of a run: wait for its nodes, check them, and run Ray Train on them once."""

import os
import threading
import time
from typing import Any

from orchestrator.run.network import use_interface
from orchestrator.run.ray import capacity, elastic
from orchestrator.run.ray.cluster import is_joined
from orchestrator.run.ray.hangs import kill_ranks
from orchestrator.run.ray.node_checks import check_new_nodes
from orchestrator.run.ray.worker import worker_loop
from orchestrator.settings.run import RunSpec
from orchestrator.training.deaths import remove_places
from orchestrator.training.heartbeat import remove_heartbeats
from orchestrator.training.ownership import TOKEN
from orchestrator.training.rundir import RunDir
from orchestrator.training.watchdog import watched_from_outside


def run_attempt(
    spec: RunSpec, run_dir: RunDir, pickled: dict[str, bytes], wait_s: float, checked: set[str]
) -> Exception | None:
    """Run one attempt of Ray Train and return its exception, or None.

    pickled: the user's objects. wait_s: seconds to wait for nodes. checked: IDs of nodes that an
    earlier attempt has checked, to which this one adds.
    """
    capacity.wait_for_capacity(spec, wait_s, run_dir)  # before each attempt: a node may be lost
    check_new_nodes(spec, checked)
    workers = elastic.count_workers(spec, wait_s, run_dir)
    check_new_nodes(spec, checked)  # an elastic run may have waited for more
    trainer = _trainer(spec, run_dir, pickled, workers)
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    # in a thread, so that Ray does not install its SIGINT handler: ours saves first
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    remove_heartbeats(run_dir)
    remove_places(run_dir)
    thread.start()
    with watched_from_outside(run_dir, workers, kill_ranks):
        if workers < spec.cluster.max_workers and is_joined():
            elastic.save_when_more_fit(spec, run_dir, workers, thread)
        while thread.is_alive():
            thread.join(capacity.POLL_S)
    return errors[0] if errors else None


def _trainer(spec: RunSpec, run_dir: RunDir, pickled: dict[str, bytes], workers: int) -> Any:
    """Return Ray's TorchTrainer of a run with so many workers."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = capacity.worker_resources(spec)
    use_gpu = resources.get("GPU", 0) > 0
    # if fewer are enough, do not wait for workers without room
    controller_failures = 0 if workers > spec.cluster.min_workers else -1
    return TorchTrainer(
        worker_loop,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "cwd": os.getcwd(),
            "use_gpu": use_gpu,
            "objects": pickled,
            "owner": os.environ.get(TOKEN),
        },
        torch_config=_torch_config(spec, "nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            placement_strategy=spec.cluster.placement,
        ),
        # a new name each time: Ray would otherwise restore its snapshot, which a crash can leave
        # unreadable
        run_config=RunConfig(
            storage_path=spec.cluster.storage_path or str(run_dir.logs / "ray"),
            name=f"{spec.run.name}-{time.time_ns()}",
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=controller_failures
            ),
        ),
    )


def _torch_config(spec: RunSpec, backend: str) -> Any:
    """Return Ray's TorchConfig with a network interface.

    It is that of the settings, or the one towards the cluster's head.
    """
    import ray
    from ray.train.torch import TorchConfig

    name = spec.cluster.network_interface
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")

    class Backend(TorchConfig().backend_cls):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_interface, name, head)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        backend_cls = property(lambda _: Backend)  # pyright: ignore

    return Config(backend=backend, timeout_s=spec.cluster.collective_timeout_s)
