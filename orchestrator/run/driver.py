"""RunSpec -> Ray Train: start or join a cluster, run the worker on every rank, resume it when workers die."""

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
from orchestrator.run import preflight
from orchestrator.run.cluster import authenticate, entered, is_joined, usable_cores
from orchestrator.run.deaths import reason_of_death
from orchestrator.run.probe import Probe
from orchestrator.run.supervise import Attempt, Supervisor
from orchestrator.settings.counts import counted
from orchestrator.settings.load import make_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.checkpoint import SaveFailed
from orchestrator.training.given import ComputeMetrics, Given, GivenCallback, check_arguments, check_spec
from orchestrator.training.health import STOP_SIGNALS, LocalSession
from orchestrator.training.manifest import ReadFailed, committed, step_of
from orchestrator.training.prepare import prepare
from orchestrator.training.result import RunResult, finished_already, finished_line
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import TrainingError
from orchestrator.training.worker import run
from orchestrator.world import World, use_interface

logger = logging.getLogger(__name__)

POLL_S = 0.2
CLUSTER_WAIT_S = 10.0  # seconds in which a cluster that is joined may still grow to the size asked for
GROWTH_WAIT_S = 30.0  # seconds in which further nodes may join before an elastic run makes use of the first
FREE_PLACEMENTS = ("PACK", "SPREAD")  # where one more worker may be anywhere


class RunDied(Exception):
    """The workers died more often than cluster.max_failures allows, without a new checkpoint in between."""


class StoppedWaiting(Exception):
    """Somebody asked the run to stop while there was no room for its workers."""


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
    """Run to the end on Ray, resuming from the last checkpoint whenever workers die.

    ref_model to data_collator: instead of what the settings say, each as `Given` has it; a copy of it is sent to the
    workers and called there, so that an object here does not see what its copy does.
    Ctrl-C (or RUN_DIR/STOP) saves and stops; a second Ctrl-C aborts. The same call again resumes.

    Raises:
        UserError: the settings, the data or the size of the cluster are wrong.
        TrainingError: training cannot go on.
        RunDied: the workers died too often.
    """
    check_spec(spec)
    check_arguments(others)
    given = Given(ref_model, optimizers, callbacks, compute_metrics, data_collator)
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
            _refuse(preflight.look_here(spec) + preflight.space_checks(spec, optimizers is not None))
        prepare(spec, given)  # a bad run is refused here, before Ray starts
        run_dir.begin(spec)
        with entered(spec), _stop_on_signal(run_dir), _following(rank_log(run_dir, 0)):
            return _supervised(spec, run_dir, lambda wait_s: _fit(spec, run_dir, sent, wait_s, looked_at))


def _supervised(spec: RunSpec, run_dir: RunDir, fit: Callable[[float], Exception | None]) -> RunResult:
    """Call fit until it ends. Ray's own FailureConfig stays 0: it would retry from a checkpoint of its choice.

    fit: seconds to wait for nodes -> what ended it, if that was no result.
    """
    supervisor = Supervisor(spec.cluster.max_failures)
    outcomes: Any = {"finished": "ended", "stopped": "ended", "refused": "refused", "failed": "failed"}
    wait_s, where = CLUSTER_WAIT_S, "the start"
    while True:
        run_dir.result.unlink(missing_ok=True)
        try:
            error = fit(wait_s)
        except UserError as too_small:
            if not supervisor.deaths:
                raise
            raise RunDied(f"{too_small}; the same command goes on from {where}") from None
        except StoppedWaiting:
            newest = committed(run_dir.checkpoints)
            step, folder = (step_of(newest[0]), str(newest[0])) if newest else (0, "")
            return RunResult("stopped", "asked while it waited for nodes", step, folder, None)
        result: dict[str, Any] = {"status": "died"}
        with suppress(FileNotFoundError, ValueError):  # half a file of a rank that was killed
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
                f"deaths without a new checkpoint: {supervisor.deaths} ({reason}); see {run_dir.logs}, "
                f"or raise cluster.max_failures (now {spec.cluster.max_failures}); "
                f"the same command goes on from {where}"
            )
        logger.warning("a worker died (%s); resuming from %s", reason, where)
        wait_s = spec.cluster.replacement_wait_s  # a node may have gone with it
        time.sleep(supervisor.backoff_s)


def _heed(run_dir: RunDir | None) -> None:
    """To be called while something is waited for: no worker is there that would find the file STOP.

    Raises:
        StoppedWaiting: it is there.
    """
    if run_dir is not None and run_dir.stop.exists():
        raise StoppedWaiting


def _fit(
    spec: RunSpec, run_dir: RunDir, given: dict[str, bytes], wait_s: float, looked_at: set[str]
) -> Exception | None:
    """One attempt of Ray Train, on nodes that are waited for so long and then looked at; returns what it raised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    _capacity(spec, wait_s, run_dir)  # before each attempt: a node may have gone
    _look_at_new_nodes(spec, looked_at)
    workers = _workers(spec, wait_s, run_dir)
    _look_at_new_nodes(spec, looked_at)  # an elastic run waits for more
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
        # a name of its own each time: Ray would otherwise restore its snapshot, which a crash can leave unreadable
        run_config=RunConfig(
            storage_path=spec.cluster.storage_path or str(run_dir.logs / "ray"),
            name=f"{spec.run.name}-{time.time_ns()}",
            # where fewer would do, workers for which there is no room after all are not waited for
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0 if workers > spec.cluster.min_workers else -1
            ),
        ),
    )
    failure: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failure.append(error)

    # in a thread, so that Ray installs no SIGINT handler of its own: ours saves first
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    run_dir.heartbeat(0).unlink(missing_ok=True)
    thread.start()
    if workers < spec.cluster.max_workers and is_joined():
        _seek_growth(spec, run_dir, workers, thread)
    while thread.is_alive():
        thread.join(POLL_S)
    return failure[0] if failure else None


def _torch_config(spec: RunSpec, backend: str) -> Any:
    """Ray's process group, met over the interface that the settings name or that leads to the head of the cluster."""
    import ray
    from ray.train.torch import TorchConfig

    name, head = spec.cluster.network_interface, ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")

    class Backend(TorchConfig().backend_cls):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_interface, name, head)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        backend_cls = property(lambda _: Backend)  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    return Config(backend=backend, timeout_s=spec.cluster.collective_timeout_s)


def worker_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs. How it ended is left in RUN_DIR/result.json, which outlives Ray."""
    if config["cwd"] not in sys.path:
        sys.path.insert(0, config["cwd"])  # the user's callbacks and collators
    spec = make_spec(config["spec"])
    run_dir = RunDir(spec.run_dir)
    world = World.join(spec.cluster.collective_timeout_s, config["use_gpu"])
    with (
        open(rank_log(run_dir, world.rank), "a", buffering=1, encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        logging.basicConfig(stream=log, level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        try:
            _say_where(world)
            # Ray is not told of checkpoints: it would take only those inside its own folder, waits up to 2 s for each
            # report, and its record of them can be lost in a crash. Manifests say which exist, to it and to us.
            run(spec, world, LocalSession(run_dir, world.rank), _unpickled(config["given"], world))
        except UserError as error:
            run_dir.write_result({"status": "refused", "error": [error.key, error.value, error.rule, error.cure]})
            raise
        except TrainingError as error:
            run_dir.write_result({"status": "failed", "reason": str(error)})
            raise
        except (ReadFailed, SaveFailed) as error:
            logger.error("%s", error)
            raise
        except BaseException:
            traceback.print_exc()  # into this rank's log; the driver only says that a worker died
            raise


def _say_where(world: World) -> None:
    """One line: which ranks are on which node, by its address in the cluster."""
    import ray

    nodes: dict[str, list[int]] = {}
    here = f"{ray.util.get_node_ip_address()} ({os.uname().nodename})"
    for rank, node in enumerate(world.gather(here)):
        nodes.setdefault(node, []).append(rank)
    if world.is_main:
        ranks = (f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}" for ranks in nodes.values())
        print("ranks: " + "; ".join(f"{each} on {node}" for each, node in zip(ranks, nodes, strict=True)), flush=True)


def _pickled(spec: RunSpec, given: Given) -> dict[str, bytes]:
    """Its parts as bytes, to be read on a worker when their modules can be imported.

    Raises:
        UserError: one cannot be sent.
    """
    if not given.parts:
        return {}
    authenticate(spec)
    from ray import cloudpickle

    sent: dict[str, bytes] = {}
    for name, part in given.parts.items():
        try:
            sent[name] = cloudpickle.dumps(part)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:  # whatever it holds on to may refuse in its own way
            reason = " ".join(str(error).split())[:160]
            cure = "let it hold names and paths, and make models and files when it is called"
            raise UserError(name, repr(part), f"cannot be sent to the workers ({reason})", cure) from None
    return sent


def _unpickled(sent: dict[str, bytes], world: World) -> Given:
    parts: dict[str, Any] = {}
    for name, part in sent.items():
        if name == "callbacks" and not world.is_main:  # which may open files when they are read
            continue
        try:
            parts[name] = pickle.loads(part)
        except Exception as error:
            rule = f"cannot be read on a worker ({type(error).__name__}: {error})"
            cure = "define it in a module of the folder where the command is given"
            raise UserError(name, "as sent", rule, cure) from None
    return Given(**parts)


def rank_log(run_dir: RunDir, rank: int) -> Path:
    """What one rank prints under Ray, over all attempts."""
    return run_dir.logs / f"rank_{rank:05d}.log"


@contextmanager
def _following(path: Path) -> Iterator[None]:
    """Print what is appended to a file meanwhile. Ray's own forwarding would prefix each line and add its own."""
    path.touch()
    over = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            while True:
                ending = over.is_set()  # read once more after the end: the last lines are the important ones
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


# --- the cluster -------------------------------------------------------------------------------------------------


def _resources(spec: RunSpec) -> dict[str, float]:
    """Resources of one worker; one GPU where the cluster has any, else one CPU."""
    if spec.cluster.resources:
        return dict(spec.cluster.resources)
    import ray

    return {"GPU": 1, "CPU": 1} if ray.cluster_resources().get("GPU", 0) else {"CPU": 1}


def _check_local_size(spec: RunSpec) -> None:
    """Refuse before Ray starts what this machine alone cannot hold."""
    if is_joined():
        return
    cores, each = usable_cores(), spec.cluster.resources.get("CPU", 1 if not spec.cluster.resources else 0)
    if spec.cluster.min_workers * each > cores:
        raise _too_small(spec, f"{each:g} CPU each, and this machine has {cores} CPUs", int(cores // each))


def _too_small(spec: RunSpec, rule: str, fits: int) -> UserError:
    return UserError(
        "cluster.num_workers",
        spec.cluster.num_workers,
        f"workers need {rule}",
        f"set cluster.num_workers={fits}, lower cluster.resources, or join a larger cluster by RAY_ADDRESS"
        if fits
        else "lower cluster.resources, or join a larger cluster by RAY_ADDRESS",
    )


def _workers(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """How many workers to start: of an elastic run as many as there is room for now.

    In a cluster that is joined they may be waited for: nodes for wait_s seconds, what others hold for as long as they
    hold it.

    Raises:
        UserError: the cluster cannot hold the fewest: Ray would wait for it for ever.
        StoppedWaiting: run_dir has the file STOP.
    """
    cluster, count = spec.cluster, min(_capacity(spec, wait_s, run_dir), spec.cluster.max_workers)
    if is_joined() and cluster.placement in FREE_PLACEMENTS:  # of the others Ray cannot be asked one by one
        with _places(spec, cluster.max_workers) as granted:
            began, told = time.monotonic(), False
            while (count := granted()) < cluster.max_workers:
                if time.monotonic() > began + CLUSTER_WAIT_S:
                    if count >= cluster.min_workers:
                        break
                    if not told:
                        told = True
                        fewest = cluster.min_workers
                        print(f"workers: {count} of {fewest} have a place; waiting for the others", flush=True)
                    _heed(run_dir)
                    _capacity(spec, wait_s, run_dir)  # a node that is gone is known to be gone only after a while
                time.sleep(POLL_S)
    if cluster.min_workers < cluster.max_workers:
        print(f"workers: {count} (cluster.num_workers = {cluster.num_workers})", flush=True)
    return count


@contextmanager
def _places(spec: RunSpec, count: int) -> Iterator[Callable[[], int]]:
    """Ask Ray for room for so many more workers; yields a function that tells how many it has granted.

    What it grants is free on a node that is alive; the resources of nodes say nothing of either.
    """
    from ray.util import placement_group, placement_group_table, remove_placement_group

    groups = [placement_group([_resources(spec)]) for _ in range(count)]
    try:
        yield lambda: sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def _seek_growth(spec: RunSpec, run_dir: RunDir, workers: int, training: threading.Thread) -> None:
    """Wait until there is room for more workers, or training ends; then have the run saved, to go on with them.

    Ray's own elasticity would kill the workers, saved or not, and would count what other programs hold as room.
    """
    if spec.cluster.placement not in FREE_PLACEMENTS:
        return
    while training.is_alive() and not run_dir.heartbeat(0).exists():  # its own workers have their places first
        training.join(POLL_S)
    with _places(spec, spec.cluster.max_workers - workers) as granted:
        found, since = 0, time.monotonic()
        while training.is_alive():
            training.join(5 * POLL_S)
            if (now := granted()) != found:
                found, since = now, time.monotonic()
            elif found and time.monotonic() - since > GROWTH_WAIT_S and not run_dir.stop.exists():
                print(f"workers: room for {workers + found}; saving, to go on with them", flush=True)
                _ask_for_growth(run_dir)


def _ask_for_growth(run_dir: RunDir) -> None:
    with suppress(FileExistsError), open(run_dir.stop, "x") as file:  # a user's request stays one
        os.utime(file.fileno(), (0, 0))


def _is_for_growth(run_dir: RunDir) -> bool:
    """Whether the request to stop is ours; whoever else asks, by a touch too, makes it his own."""
    return run_dir.stop.exists() and run_dir.stop.stat().st_mtime == 0


def _capacity(spec: RunSpec, wait_s: float, run_dir: RunDir | None = None) -> int:
    """How many workers the nodes of the cluster can hold, whoever uses them now; nodes are waited for so long.

    Raises:
        UserError: fewer than the run must have.
        StoppedWaiting: run_dir has the file STOP.
    """
    wanted = _resources(spec)
    began = time.monotonic()
    told = False
    while True:
        nodes = _alive()
        holds = [node["Resources"] for node in nodes]
        # 0.6 / 0.2 is a little less than 3, and 1 // 0.2 is 4
        per_node = [int(min(node.get(name, 0) / n for name, n in wanted.items() if n) + 1e-6) for node in holds]
        fits = _placeable(per_node, spec.cluster.placement)
        if fits >= spec.cluster.min_workers:
            return fits
        if not is_joined() or time.monotonic() > began + wait_s:
            break
        if not told and time.monotonic() > began + CLUSTER_WAIT_S:
            told = True
            print(f"the cluster holds {counted(fits, 'worker')}; waiting {wait_s:g} s for a node to join", flush=True)
        _heed(run_dir)
        time.sleep(0.5)
    asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    alike: dict[str, list[str]] = {}
    for node, has in zip(nodes, holds, strict=True):
        alike.setdefault(", ".join(f"{has.get(name, 0):g} {name}" for name in wanted), []).append(_named(node))
    there = "; ".join(f"{amounts} on {preflight.listed(names)}" for amounts, names in alike.items())
    rule = f"{asked} each, placed {spec.cluster.placement}, and the cluster's nodes have room for {fits}: {there}"
    raise _too_small(spec, rule, fits)


def _alive() -> list[dict[str, Any]]:
    """The nodes of the cluster, as Ray describes them."""
    import ray

    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"])


def _named(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"


def _placeable(per_node: list[int], placement: str) -> int:
    """How many workers a cluster holds under Ray's placement strategies, given how many each node would hold."""
    if placement == "STRICT_PACK":
        return max(per_node, default=0)
    if placement == "STRICT_SPREAD":
        return sum(1 for fits in per_node if fits)
    return sum(per_node)


# --- every node looked at before training ------------------------------------------------------------------------


def doctor(spec: RunSpec | None) -> list[preflight.Check]:
    """What is found on this machine and, where RAY_ADDRESS names a cluster, on every node that could train.

    Raises:
        UserError: the cluster cannot be joined.
    """
    checks = preflight.space_checks(spec) if spec is not None else []
    if not is_joined():
        # without a cluster all workers are on this machine
        gpus = spec.cluster.resources.get("GPU", 0) * spec.cluster.min_workers if spec is not None else 0
        return preflight.look_here(spec, gpus) + checks
    with entered(spec):
        if spec is not None:
            try:
                _capacity(spec, CLUSTER_WAIT_S)
            except UserError as small:
                checks.append(preflight.Check(small.key, "", str(small.value), small.rule, small.cure))
        return _look(spec, _nodes(spec)) + checks


def _look_at_new_nodes(spec: RunSpec, looked_at: set[str]) -> None:
    """Refuse nodes on which the run would go wrong; those that an earlier attempt has looked at are left alone.

    Raises:
        UserError: what is wrong, a line each.
    """
    import ray

    if not spec.cluster.preflight:
        return
    nodes = [node for node in _nodes(spec) if node["NodeID"] not in looked_at]
    is_first, began = not looked_at, time.monotonic()
    looked_at |= {node["NodeID"] for node in nodes}
    if not nodes or looked_at <= {ray.get_runtime_context().get_node_id()}:  # of this machine all is known
        return
    # one that goes while an attempt dies is no reason to end the run
    _refuse(check for check in _look(spec, nodes) if is_first or check.name != preflight.SILENT)
    print(f"nodes: {len(nodes)} looked at in {time.monotonic() - began:.1f} s", flush=True)


def _refuse(checks: Iterable[preflight.Check]) -> None:
    if (error := preflight.refusal(checks)) is not None:
        raise error


def _nodes(spec: RunSpec | None) -> list[dict[str, Any]]:
    """The nodes that are alive and can hold a worker; without settings all that are alive."""
    wanted = _resources(spec) if spec is not None else {}
    return [node for node in _alive() if all(node["Resources"].get(name, 0) >= n for name, n in wanted.items())]


def _look(spec: RunSpec | None, nodes: list[dict[str, Any]]) -> list[preflight.Check]:
    """Have nodes, and this process, look at themselves and at each other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors: list[Any] = []

    def asked(node: dict[str, Any]) -> preflight.Node:
        # without resources, as others may use all of them; such an actor sees every GPU of its node
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = ray.remote(Probe)  # pyright: ignore[reportArgumentType, reportCallIssue]
        actor = probe.options(num_cpus=0, num_gpus=0, scheduling_strategy=there).remote()
        actors.append(actor)
        address = node["NodeManagerAddress"]
        return preflight.Node(
            _named(node),
            address,
            node["Resources"].get("GPU", 0) if use_gpu else 0,
            lambda method, *given: getattr(actor, method).remote(*given).future(),
        )

    gpus, free = (resources.get("GPU", 0) for resources in (ray.cluster_resources(), ray.available_resources()))
    use_gpu = _resources(spec).get("GPU", 0) > 0 if spec is not None else gpus > 0
    driver = preflight.this_process(f"{preflight.DRIVER} ({os.uname().nodename})")
    try:
        machines = {_named(node): node for node in nodes}.values()  # of which one may be several nodes to Ray
        return preflight.look(driver, [asked(node) for node in machines], spec, free == gpus, use_gpu)
    finally:
        for actor in actors:
            ray.kill(actor)


@contextmanager
def _stop_on_signal(run_dir: RunDir) -> Iterator[None]:
    """STOP_SIGNALS ask the workers to save and stop, through the STOP file; INT or TERM a second time aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number in received and number != signal.SIGUSR1:  # Slurm may send USR1, and TERM while that is obeyed
            raise KeyboardInterrupt
        received.append(number)
        run_dir.stop.write_text(f"received {signal.Signals(number).name}")
        print("stopping: the run is saved at the next step; once more to abort", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
