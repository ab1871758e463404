"""Train on Ray: start or join a cluster, run the worker on every rank, and resume when
workers die.
"""

import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.data.collate import UserCollator
from orchestrator.engines.optim import Optimizers
from orchestrator.models.reference import RefModel
from orchestrator.run.checks import preflight
from orchestrator.run.checks.probe import Probe
from orchestrator.run.ray.cluster import authenticate, entered, is_joined, usable_cores
from orchestrator.run.ray.deaths import reason_of_death
from orchestrator.run.supervise import Attempt, Supervisor
from orchestrator.settings.counts import counted
from orchestrator.settings.load import make_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.checkpoint import SaveFailed
from orchestrator.training.errors import TrainingError
from orchestrator.training.health import STOP_SIGNALS, LocalSession
from orchestrator.training.manifest import ReadFailed, committed, step_of
from orchestrator.training.prepare import prepare
from orchestrator.training.result import RunResult, finished_already, finished_line
from orchestrator.training.rundir import RunDir
from orchestrator.training.user_objects import (
    ComputeMetrics,
    GivenCallback,
    UserObjects,
    check_arguments,
    check_spec,
)
from orchestrator.training.worker import run
from orchestrator.world import World, use_interface

logger = logging.getLogger(__name__)

POLL_S = 0.2
CLUSTER_WAIT_S = 10.0  # seconds in which an existing cluster may still grow to the required size
GROWTH_WAIT_S = 30.0  # seconds in which further nodes may join before an elastic run uses the first
FREE_PLACEMENTS = ("PACK", "SPREAD")  # strategies under which one more worker may be on any node


class RunDied(Exception):
    """Error: workers died more often than cluster.max_failures allows, without a new checkpoint in
    between.
    """


class StoppedWaiting(Exception):
    """Signal that the run was told to stop while it waited for room for its workers."""


def train(
    spec: RunSpec,
    *,
    ref_model: RefModel | None = None,
    optimizers: Optimizers | None = None,
    callbacks: Sequence[GivenCallback] | None = None,
    compute_metrics: ComputeMetrics | None = None,
    data_collator: UserCollator | None = None,
    **others: Any,
) -> RunResult:
    """Train on Ray to the end, resuming from the last checkpoint whenever workers die.

    ref_model to data_collator: objects used instead of the settings (see `UserObjects`); each is
    copied to the workers and called there, so the objects of this process do not change. Ctrl-C (or
    RUN_DIR/STOP) saves and stops; a second Ctrl-C aborts. The same call again resumes.

    Raises:
        UserError: the settings, the data or the size of the cluster are wrong.
        TrainingError: training cannot continue.
        RunDied: the workers died too often.
    """
    check_spec(spec)
    check_arguments(others)
    given = UserObjects(ref_model, optimizers, callbacks, compute_metrics, data_collator)
    sent = _pickled(spec, given)
    if spec.cluster.preflight:
        preflight.check_answers(spec)
    run_dir, looked_at = RunDir(spec.run_dir), set[str]()
    with run_dir.owned():
        run_dir.check(spec)
        if (done := finished_already(run_dir)) is not None:
            print(finished_line(run_dir), flush=True)
            return done
        _check_local_size(spec)
        if spec.cluster.preflight:
            _refuse(
                preflight.look_here(spec) + preflight.space_checks(spec, optimizers is not None)
            )
        prepare(spec, given)  # errors of settings and data are raised here, before Ray starts
        run_dir.begin(spec)
        with entered(spec), _stop_on_signal(run_dir), _following(rank_log(run_dir, 0)):
            return _supervised(
                spec, run_dir, lambda wait_s: _fit(spec, run_dir, sent, wait_s, looked_at)
            )


def _supervised(
    spec: RunSpec, run_dir: RunDir, fit: Callable[[float], Exception | None]
) -> RunResult:
    """Call fit until the run ends.

    Ray's own FailureConfig stays 0: it would retry from a checkpoint of its choice.

    fit: function from seconds to wait for nodes to the exception that ended the attempt, or None.
    """
    supervisor = Supervisor(spec.cluster.max_failures)
    outcomes: Any = {
        "finished": "ended",
        "stopped": "ended",
        "refused": "refused",
        "failed": "failed",
    }
    wait_s, where = CLUSTER_WAIT_S, "the start"
    while True:
        run_dir.result.unlink(missing_ok=True)
        try:
            error = fit(wait_s)
        except UserError as too_small:
            if not supervisor.deaths:
                raise
            raise RunDied(f"{too_small}; the same command continues from {where}") from None
        except StoppedWaiting:
            newest = committed(run_dir.checkpoints)
            step, folder = (step_of(newest[0]), str(newest[0])) if newest else (0, "")
            return RunResult("stopped", "while it waited for nodes", step, folder, None)
        result: dict[str, Any] = {"status": "died"}
        with suppress(FileNotFoundError, ValueError):  # an incomplete file of a killed rank
            result = json.loads(run_dir.result.read_text())
        if _is_for_growth(run_dir):
            run_dir.stop.unlink()
            if result["status"] == "stopped":
                continue
        newest = committed(run_dir.checkpoints)
        newest_step = step_of(newest[0]) if newest else -1
        action = supervisor.after(Attempt(outcomes.get(result["status"], "died"), newest_step))
        if action == "done":
            return RunResult(**result)
        if action == "refuse":
            raise UserError(*result["error"])
        if result["status"] == "failed":
            raise TrainingError(result["reason"])
        reason = reason_of_death(error, partial(rank_log, run_dir))
        where = f"step {newest_step}" if newest else "the start"
        if action == "give up":
            raise RunDied(
                f"deaths without a new checkpoint: {supervisor.deaths} ({reason}); see "
                f"{run_dir.logs}, or raise cluster.max_failures (now "
                f"{spec.cluster.max_failures}); the same command continues from {where}"
            )
        logger.warning("a worker died (%s); resuming from %s", reason, where)
        wait_s = spec.cluster.replacement_wait_s  # its node may be lost, too
        time.sleep(supervisor.backoff_s)


def _heed(run_dir: RunDir | None) -> None:
    """Check for the file STOP while waiting: there is no worker yet to notice it.

    Raises:
        StoppedWaiting: the file exists.
    """
    if run_dir is not None and run_dir.stop.exists():
        raise StoppedWaiting


def _fit(
    spec: RunSpec, run_dir: RunDir, given: dict[str, bytes], wait_s: float, looked_at: set[str]
) -> Exception | None:
    """Run one attempt of Ray Train and return its exception, or None.

    Waits for nodes up to wait_s and checks them.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _capacity(spec, wait_s, run_dir)  # before each attempt: a node may be lost
    _look_at_new_nodes(spec, looked_at)
    workers = _workers(spec, wait_s, run_dir)
    _look_at_new_nodes(spec, looked_at)  # an elastic run may have waited for more
    resources = _resources(spec)
    use_gpu = resources.get("GPU", 0) > 0
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "cwd": os.getcwd(),
            "use_gpu": use_gpu,
            "given": given,
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
            # if fewer are enough, do not wait for workers without room
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0 if workers > spec.cluster.min_workers else -1,
            ),
        ),
    )
    failure: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failure.append(error)

    # in a thread, so that Ray does not install its SIGINT handler: ours saves first
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    run_dir.heartbeat(0).unlink(missing_ok=True)
    thread.start()
    if workers < spec.cluster.max_workers and is_joined():
        _seek_growth(spec, run_dir, workers, thread)
    while thread.is_alive():
        thread.join(POLL_S)
    return failure[0] if failure else None


def _torch_config(spec: RunSpec, backend: str) -> Any:
    """Return Ray's TorchConfig with the network interface of the settings, or the one towards the
    cluster's head.
    """
    import ray
    from ray.train.torch import TorchConfig

    name, head = (
        spec.cluster.network_interface,
        ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]"),
    )

    class Backend(TorchConfig().backend_cls):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_interface, name, head)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        backend_cls = property(lambda _: Backend)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    return Config(backend=backend, timeout_s=spec.cluster.collective_timeout_s)


def worker_loop(config: dict[str, Any]) -> None:
    """Run the worker on one rank of Ray Train; its outcome is written to RUN_DIR/result.json, which
    outlives Ray.
    """
    if config["cwd"] not in sys.path:
        sys.path.insert(0, config["cwd"])  # the user's callbacks and collators
    spec = make_spec(config["spec"])
    run_dir = RunDir(spec.run_dir)
    world = World.join(spec.cluster.collective_timeout_s, config["use_gpu"])
    with (
        open(
            rank_log(run_dir, world.rank),
            "a",
            buffering=1,
            encoding="utf-8",
            errors="backslashreplace",
        ) as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        logging.basicConfig(
            stream=log, level=logging.WARNING, format="%(levelname)s: %(message)s", force=True
        )
        try:
            _say_where(world)
            # Checkpoints are not reported to Ray: it accepts only those in its own folder, waits up
            # to 2 s for each report, and can lose its record of them in a crash. Manifests record
            # which exist.
            run(spec, world, LocalSession(run_dir, world.rank), _unpickled(config["given"], world))
        except UserError as error:
            run_dir.write_result(
                {"status": "refused", "error": [error.key, error.value, error.rule, error.cure]}
            )
            raise
        except TrainingError as error:
            run_dir.write_result({"status": "failed", "reason": str(error)})
            raise
        except (ReadFailed, SaveFailed) as error:
            logger.error("%s", error)
            raise
        except BaseException:
            traceback.print_exc()  # to this rank's log; the driver prints only that a worker died
            raise


def _say_where(world: World) -> None:
    """Print one line with the ranks of each node, by its address in the cluster."""
    import ray

    nodes: dict[str, list[int]] = {}
    here = f"{ray.util.get_node_ip_address()} ({os.uname().nodename})"
    for rank, node in enumerate(world.gather(here)):
        nodes.setdefault(node, []).append(rank)
    if world.is_main:
        ranks = (
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
            for ranks in nodes.values()
        )
        print(
            "ranks: "
            + "; ".join(f"{each} on {node}" for each, node in zip(ranks, nodes, strict=True)),
            flush=True,
        )


def _pickled(spec: RunSpec, given: UserObjects) -> dict[str, bytes]:
    """Return the user's objects as bytes, which workers unpickle when the modules can be imported.

    Raises:
        UserError: an object cannot be pickled.
    """
    if not given.parts:
        return {}
    authenticate(spec)
    from ray import cloudpickle

    sent: dict[str, bytes] = {}
    for name, part in given.parts.items():
        try:
            sent[name] = cloudpickle.dumps(part)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:  # any object inside may raise any exception
            reason = " ".join(str(error).split())[:160]
            cure = (
                "store only names and paths in it, and create models and open files when it "
                "is called"
            )
            raise UserError(
                name, repr(part), f"cannot be sent to the workers ({reason})", cure
            ) from None
    return sent


def _unpickled(sent: dict[str, bytes], world: World) -> UserObjects:
    parts: dict[str, Any] = {}
    for name, part in sent.items():
        if name == "callbacks" and not world.is_main:  # unpickling may open files
            continue
        try:
            parts[name] = pickle.loads(part)
        except Exception as error:
            rule = f"cannot be read on a worker ({type(error).__name__}: {error})"
            cure = "define it in a module of the folder where the command runs"
            raise UserError(name, "as sent", rule, cure) from None
    return UserObjects(**parts)


def rank_log(run_dir: RunDir, rank: int) -> Path:
    """Return the log of a rank's output under Ray, over all attempts."""
    return run_dir.logs / f"rank_{rank:05d}.log"


@contextmanager
def _following(path: Path) -> Iterator[None]:
    """Print lines as they are appended to a file.

    Ray's own forwarding would prefix each line and add others.
    """
    path.touch()
    over = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            while True:
                ending = over.is_set()  # read once more after the end, for the important last lines
                for line in file:
                    print(line, end="", flush=True)
                if ending:
                    return
                over.wait(0.2)

    thread = threading.Thread(target=follow, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- the cluster ----------------------------------------------------------------------------------


def _resources(spec: RunSpec) -> dict[str, float]:
    """Return the resources of one worker; by default one GPU (and CPU) if the cluster has any, else
    one CPU.
    """
    if spec.cluster.resources:
        return dict(spec.cluster.resources)
    import ray

    return {"GPU": 1, "CPU": 1} if ray.cluster_resources().get("GPU", 0) else {"CPU": 1}


def _check_local_size(spec: RunSpec) -> None:
    """Check before Ray starts that the workers fit on this machine, unless a cluster is joined."""
    if is_joined():
        return
    cores, each = (
        usable_cores(),
        spec.cluster.resources.get("CPU", 1 if not spec.cluster.resources else 0),
    )
    if spec.cluster.min_workers * each > cores:
        raise _too_small(
            spec, f"{each:g} CPU each, but this machine has {cores} CPUs", int(cores // each)
        )


def _too_small(spec: RunSpec, rule: str, fits: int) -> UserError:
    return UserError(
        "cluster.num_workers",
        spec.cluster.num_workers,
        f"workers need {rule}",
        f"set cluster.num_workers={fits}, lower cluster.resources, or join a larger cluster with "
        "RAY_ADDRESS"
        if fits
        else "lower cluster.resources, or join a larger cluster with RAY_ADDRESS",
    )


def _workers(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """Return how many workers to start: for an elastic run as many as fit now.

    In an existing cluster this may wait: up to wait_s seconds for nodes, and without limit for
    resources that others hold.

    Raises:
        UserError: the cluster cannot hold the fewest workers: Ray would wait forever.
        StoppedWaiting: run_dir has the file STOP.
    """
    cluster, count = spec.cluster, min(_capacity(spec, wait_s, run_dir), spec.cluster.max_workers)
    if (
        is_joined() and cluster.placement in FREE_PLACEMENTS
    ):  # for other strategies, workers cannot be placed one by one
        with _places(spec, cluster.max_workers) as granted:
            began, printed = time.monotonic(), False
            while (count := granted()) < cluster.max_workers:
                if time.monotonic() > began + CLUSTER_WAIT_S:
                    if count >= cluster.min_workers:
                        break
                    if not printed:
                        printed = True
                        fewest = cluster.min_workers
                        print(
                            f"workers: {count} of {fewest} are placed; waiting for the others",
                            flush=True,
                        )
                    _heed(run_dir)
                    _capacity(spec, wait_s, run_dir)  # Ray notices a lost node only after a while
                time.sleep(POLL_S)
    if cluster.min_workers < cluster.max_workers:
        print(f"workers: {count} (cluster.num_workers = {cluster.num_workers})", flush=True)
    return count


@contextmanager
def _places(spec: RunSpec, count: int) -> Iterator[Callable[[], int]]:
    """Request placement of `count` more workers from Ray; yield a function that returns how many
    are granted.

    Granted places are free and on live nodes, which the resources that nodes report do not show.
    """
    from ray.util import placement_group, placement_group_table, remove_placement_group

    groups = [placement_group([_resources(spec)]) for _ in range(count)]
    try:
        yield lambda: sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def _seek_growth(spec: RunSpec, run_dir: RunDir, workers: int, training: threading.Thread) -> None:
    """Wait until more workers fit or training ends; in the first case save the run, to resume with
    them.

    Ray's own elasticity would kill the workers without a save, and would count resources of other
    programs as free.
    """
    if spec.cluster.placement not in FREE_PLACEMENTS:
        return
    while (
        training.is_alive() and not run_dir.heartbeat(0).exists()
    ):  # the run's own workers are placed first
        training.join(POLL_S)
    with _places(spec, spec.cluster.max_workers - workers) as granted:
        found, since = 0, time.monotonic()
        while training.is_alive():
            training.join(5 * POLL_S)
            if (now := granted()) != found:
                found, since = now, time.monotonic()
            elif found and time.monotonic() - since > GROWTH_WAIT_S and not run_dir.stop.exists():
                print(
                    f"workers: room for {workers + found}; saving, to resume with them", flush=True
                )
                _ask_for_growth(run_dir)


def _ask_for_growth(run_dir: RunDir) -> None:
    with suppress(FileExistsError), open(run_dir.stop, "x") as file:  # keep a user's request
        os.utime(file.fileno(), (0, 0))


def _is_for_growth(run_dir: RunDir) -> bool:
    """Return whether the driver itself requested the stop; any other request, even a touch, changes
    the file's time.
    """
    return run_dir.stop.exists() and run_dir.stop.stat().st_mtime == 0


def _capacity(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """Return how many workers the cluster's nodes can hold, ignoring current use; wait up to wait_s
    for nodes.

    Raises:
        UserError: fewer than the run needs.
        StoppedWaiting: run_dir has the file STOP.
    """
    needed = _resources(spec)
    began = time.monotonic()
    printed = False
    while True:
        nodes = _alive()
        holds = [node["Resources"] for node in nodes]
        # 0.6 / 0.2 is a little less than 3, and 1 // 0.2 is 4
        per_node = [
            int(min(node.get(name, 0) / n for name, n in needed.items() if n) + 1e-6)
            for node in holds
        ]
        fits = _placeable(per_node, spec.cluster.placement)
        if fits >= spec.cluster.min_workers:
            return fits
        if not is_joined() or time.monotonic() > began + wait_s:
            break
        if not printed and time.monotonic() > began + CLUSTER_WAIT_S:
            printed = True
            print(
                f"the cluster can hold {counted(fits, 'worker')}; waiting {wait_s:g} s for a node "
                "to join",
                flush=True,
            )
        _heed(run_dir)
        time.sleep(0.5)
    amounts_each = ", ".join(f"{amount:g} {name}" for name, amount in needed.items())
    alike: dict[str, list[str]] = {}
    for node, has in zip(nodes, holds, strict=True):
        alike.setdefault(", ".join(f"{has.get(name, 0):g} {name}" for name in needed), []).append(
            _named(node)
        )
    there = "; ".join(f"{amounts} on {preflight.listed(names)}" for amounts, names in alike.items())
    rule = (
        f"{amounts_each} each, placed {spec.cluster.placement}, but the nodes of the cluster "
        f"can hold {fits}: {there}"
    )
    raise _too_small(spec, rule, fits)


def _alive() -> list[dict[str, Any]]:
    """Return the live nodes of the cluster as described by Ray, sorted by address."""
    import ray

    return sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
    )


def _named(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def _placeable(per_node: list[int], placement: str) -> int:
    """Return how many workers fit under a placement strategy of Ray, from how many fit on each
    node.
    """
    if placement == "STRICT_PACK":
        return max(per_node, default=0)
    if placement == "STRICT_SPREAD":
        return sum(1 for fits in per_node if fits)
    return sum(per_node)


# --- checks of every node before training ---------------------------------------------------------


def doctor(spec: RunSpec | None) -> list[preflight.Check]:
    """Check this machine and, if RAY_ADDRESS names a cluster, every node that could train.

    Raises:
        UserError: the cluster cannot be joined.
    """
    checks = preflight.space_checks(spec) if spec is not None else []
    if not is_joined():
        # without a cluster all workers are on this machine
        gpus = (
            spec.cluster.resources.get("GPU", 0) * spec.cluster.min_workers
            if spec is not None
            else 0
        )
        return preflight.look_here(spec, gpus) + checks
    with entered(spec):
        if spec is not None:
            try:
                _capacity(spec, CLUSTER_WAIT_S)
            except UserError as small:
                checks.append(
                    preflight.Check(small.key, "", str(small.value), small.rule, small.cure)
                )
        return _look(spec, _nodes(spec)) + checks


def _look_at_new_nodes(spec: RunSpec, looked_at: set[str]) -> None:
    """Check nodes that no earlier attempt has checked.

    Raises:
        UserError: every failed check, one line each.
    """
    import ray

    if not spec.cluster.preflight:
        return
    nodes = [node for node in _nodes(spec) if node["NodeID"] not in looked_at]
    is_first, began = not looked_at, time.monotonic()
    looked_at |= {node["NodeID"] for node in nodes}
    if not nodes or looked_at <= {
        ray.get_runtime_context().get_node_id()
    }:  # this machine has been checked already
        return
    # a node that is lost while an attempt dies must not end the run
    _refuse(check for check in _look(spec, nodes) if is_first or check.name != preflight.SILENT)
    print(f"nodes: {len(nodes)} checked in {time.monotonic() - began:.1f} s", flush=True)


def _refuse(checks: Iterable[preflight.Check]) -> None:
    if (error := preflight.refusal(checks)) is not None:
        raise error


def _nodes(spec: RunSpec | None) -> list[dict[str, Any]]:
    """Return the live nodes that can hold a worker; without settings all live nodes."""
    needed = _resources(spec) if spec is not None else {}
    return [
        node
        for node in _alive()
        if all(node["Resources"].get(name, 0) >= n for name, n in needed.items())
    ]


def _look(spec: RunSpec | None, nodes: list[dict[str, Any]]) -> list[preflight.Check]:
    """Run the checks of preflight on nodes and this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors: list[Any] = []

    def probed(node: dict[str, Any]) -> preflight.Node:
        # without resources, as other programs may hold all; such an actor sees every GPU of its
        # node
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(Probe)  # pyright: ignore[reportArgumentType, reportCallIssue]
        actor = probe.options(num_cpus=0, num_gpus=0, scheduling_strategy=there).remote()
        actors.append(actor)
        address = node["NodeManagerAddress"]
        return preflight.Node(
            _named(node),
            address,
            node["Resources"].get("GPU", 0) if use_gpu else 0,
            lambda method, *arguments: getattr(actor, method).remote(*arguments).future(),
        )

    gpus, free = (
        resources.get("GPU", 0)
        for resources in (ray.cluster_resources(), ray.available_resources())
    )
    use_gpu = _resources(spec).get("GPU", 0) > 0 if spec is not None else gpus > 0
    driver = preflight.this_process(f"{preflight.DRIVER} ({os.uname().nodename})")
    try:
        machines = {
            _named(node): node for node in nodes
        }.values()  # Ray may count one machine as several nodes
        return preflight.look(
            driver, [probed(node) for node in machines], spec, free == gpus, use_gpu
        )
    finally:
        for actor in actors:
            ray.kill(actor)


@contextmanager
def _stop_on_signal(run_dir: RunDir) -> Iterator[None]:
    """Handle STOP_SIGNALS: write the file STOP, so that workers save and stop; a second INT or TERM
    aborts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if (
            number in received and number != signal.SIGUSR1
        ):  # Slurm may send USR1, and then TERM while the run saves
            raise KeyboardInterrupt
        received.append(number)
        run_dir.stop.write_text(f"received {signal.Signals(number).name}")
        print(
            "stopping: the run saves after the next step; repeat to abort",
            file=sys.stderr,
            flush=True,
        )

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
