"""RunSpec -> Ray Train: start or join a cluster, run the worker on every rank, resume it when workers die."""

import atexit
import functools
import json
import logging
import os
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.engines.optim import Optimizers, check_functions
from orchestrator.models.reference import RefModel, check_function
from orchestrator.run.supervise import Attempt, Supervisor
from orchestrator.settings.load import make_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.checkpoint import ReadFailed, SaveFailed, committed
from orchestrator.training.health import STOP_SIGNALS, LocalSession
from orchestrator.training.rundir import RunDir
from orchestrator.training.trainer import TrainingError
from orchestrator.training.worker import RunResult, finished_already, prepare, run
from orchestrator.world import World

logger = logging.getLogger(__name__)

POLL_S = 0.2
CLUSTER_WAIT_S = 10.0  # seconds in which a cluster that is joined may still grow to the size asked for
GROWTH_WAIT_S = 30.0  # seconds in which further nodes may join before an elastic run makes use of the first
FREE_PLACEMENTS = ("PACK", "SPREAD")  # where one more worker may be anywhere


class RunDied(Exception):
    """The workers died more often than cluster.max_failures allows, without a new checkpoint in between."""


def train(spec: RunSpec, ref_model: RefModel | None = None, optimizers: Optimizers | None = None) -> RunResult:
    """Run to the end on Ray, resuming from the last checkpoint whenever workers die.

    ref_model: policy -> reference, instead of what the settings say; it is sent to every worker and called there.
    optimizers: (params -> optimizer, optimizer -> schedule), likewise; where one is None the settings say. params are
    groups, dicts with "params" and "weight_decay", and torch.optim.SGD(params, lr=1e-6) takes them as they are.
    Ctrl-C (or RUN_DIR/STOP) saves and stops; a second Ctrl-C aborts. The same call again resumes.

    Raises:
        UserError: the settings, the data or the size of the cluster are wrong.
        TrainingError: training cannot go on.
        RunDied: the workers died too often.
    """
    check_function(ref_model)
    check_functions(optimizers)
    sent = _pickled(spec, {"ref_model": ref_model, "optimizers": optimizers})
    run_dir = RunDir(spec.run_dir)
    with run_dir.owned():
        run_dir.check(spec)
        if (done := finished_already(run_dir)) is not None:
            return done
        _check_local_size(spec)
        prepare(spec)  # a bad run is refused here, before Ray starts
        run_dir.begin(spec)
        with _cluster(spec), _stop_on_signal(run_dir), _following(rank_log(run_dir, 0)):
            return _supervised(spec, run_dir, lambda: _fit(spec, run_dir, sent))


def _supervised(spec: RunSpec, run_dir: RunDir, fit: Callable[[], Exception | None]) -> RunResult:
    """Call fit until it ends. Ray's own FailureConfig stays 0: it would retry from a checkpoint of its choice."""
    supervisor = Supervisor(spec.cluster.max_failures)
    outcomes: Any = {"finished": "ended", "stopped": "ended", "refused": "refused", "failed": "failed"}
    while True:
        run_dir.result.unlink(missing_ok=True)
        error = fit()
        result: dict[str, Any] = {"status": "died"}
        if run_dir.result.is_file():
            result = json.loads(run_dir.result.read_text())
        if _is_for_growth(run_dir):
            run_dir.stop.unlink()
            if result["status"] == "stopped":
                continue
        newest = committed(run_dir.checkpoints)
        newest_step = int(newest[0].name.removeprefix("step_")) if newest else -1
        action = supervisor.after(Attempt(outcomes.get(result["status"], "died"), newest_step))
        if action == "done":
            return RunResult(**result)
        if action == "refuse":
            raise UserError(*result["error"])
        if result["status"] == "failed":
            raise TrainingError(result["reason"])
        reason = " ".join(str(error).split())[-300:]
        where = f"step {newest_step}" if newest else "the start"
        if action == "give up":
            raise RunDied(
                f"{supervisor.deaths} deaths without a new checkpoint ({reason}); see {run_dir.logs}, "
                f"or raise cluster.max_failures (now {spec.cluster.max_failures}); "
                f"the same command goes on from {where}"
            )
        logger.warning("a worker died (%s); resuming from %s", reason, where)
        time.sleep(supervisor.backoff_s)


def _fit(spec: RunSpec, run_dir: RunDir, functions: dict[str, bytes]) -> Exception | None:
    """One attempt of Ray Train; returns what it raised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers = _workers(spec)  # before each attempt: a node may have gone
    resources = _resources(spec)
    use_gpu = resources.get("GPU", 0) > 0
    trainer = TorchTrainer(
        worker_loop,
        train_loop_config={
            "spec": spec.model_dump(mode="json"),
            "cwd": os.getcwd(),
            "use_gpu": use_gpu,
            "functions": functions,
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=spec.cluster.collective_timeout_s),
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
    if workers < spec.cluster.max_workers and _joined():
        _seek_growth(spec, run_dir, workers, thread)
    while thread.is_alive():
        thread.join(POLL_S)
    return failure[0] if failure else None


def worker_loop(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs. How it ended is left in RUN_DIR/result.json, which outlives Ray."""
    if config["cwd"] not in sys.path:
        sys.path.insert(0, config["cwd"])  # the user's callbacks and collators
    spec = make_spec(config["spec"])
    run_dir = RunDir(spec.run_dir)
    world = World.join(spec.cluster.collective_timeout_s, config["use_gpu"])
    with open(rank_log(run_dir, world.rank), "a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        logging.basicConfig(stream=log, level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
        try:
            # Ray is not told of checkpoints: it would take only those inside its own folder, waits up to 2 s for each
            # report, and its record of them can be lost in a crash. Manifests say which exist, to it and to us.
            run(spec, world, LocalSession(run_dir, world.rank), **_unpickled(config["functions"]))
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


def _pickled(spec: RunSpec, functions: dict[str, Any]) -> dict[str, bytes]:
    """Arguments of `run` that are functions, as bytes, to be read on a worker when their modules can be imported.

    Raises:
        UserError: one cannot be sent.
    """
    given = {name: function for name, function in functions.items() if function is not None}
    if not given:
        return {}
    _authenticate(spec)
    from ray import cloudpickle

    sent: dict[str, bytes] = {}
    for name, function in given.items():
        try:
            sent[name] = cloudpickle.dumps(function)  # pyright: ignore[reportPrivateImportUsage]
        except Exception as error:  # whatever it holds on to may refuse in its own way
            reason = " ".join(str(error).split())[:160]
            cure = "let it hold names and paths, and make models and files when it is called"
            raise UserError(name, repr(function), f"cannot be sent to the workers ({reason})", cure) from None
    return sent


def _unpickled(sent: dict[str, bytes]) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    for name, function in sent.items():
        try:
            functions[name] = pickle.loads(function)
        except Exception as error:
            rule = f"cannot be read on a worker ({type(error).__name__}: {error})"
            cure = "define it in a module of the folder where the command is given"
            raise UserError(name, "function", rule, cure) from None
    return functions


def rank_log(run_dir: RunDir, rank: int) -> Path:
    """What one rank prints under Ray, over all attempts."""
    return run_dir.logs / f"rank_{rank:05d}.log"


@contextmanager
def _following(path: Path) -> Iterator[None]:
    """Print what is appended to a file meanwhile. Ray's own forwarding would prefix each line and add its own."""
    path.touch()
    over = threading.Event()

    def follow() -> None:
        with open(path) as file:
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


def _joined() -> bool:
    """Whether the cluster is there already, and others may use it too."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _check_local_size(spec: RunSpec) -> None:
    """Refuse before Ray starts what this machine alone cannot hold."""
    if _joined():
        return
    cores, each = _cores(), spec.cluster.resources.get("CPU", 1 if not spec.cluster.resources else 0)
    if spec.cluster.min_workers * each > cores:
        raise _too_small(spec, f"{each:g} CPU each, and this machine has {cores} CPUs", int(cores // each))


def _cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _too_small(spec: RunSpec, rule: str, fits: int) -> UserError:
    return UserError(
        "cluster.num_workers",
        spec.cluster.num_workers,
        f"workers need {rule}",
        f"set cluster.num_workers={fits}, lower cluster.resources, or join a larger cluster by RAY_ADDRESS"
        if fits
        else "lower cluster.resources, or join a larger cluster by RAY_ADDRESS",
    )


@contextmanager
def _cluster(spec: RunSpec) -> Iterator[None]:
    """The cluster at RAY_ADDRESS, or one of our own on this machine; left or closed afterwards."""
    options: Any = {} if _joined() else {"address": "local", "include_dashboard": False, "num_cpus": _cores()}
    _authenticate(spec)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that its default will change
    import ray

    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _authenticate(spec: RunSpec) -> None:
    """How a Ray of our own is entered; before ray is imported, which reads it then."""
    if _joined():
        return  # one that is joined has its own
    os.environ["RAY_AUTH_MODE"] = spec.cluster.auth
    if spec.cluster.auth == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token_file())


@functools.cache  # Ray reads it once in a process
def _token_file() -> Path:
    """A token that only this user can read, until this process ends; Ray's own default is readable by the world."""
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _workers(spec: RunSpec) -> int:
    """How many workers to start: of an elastic run as many as there is room for now.

    Raises:
        UserError: the cluster cannot hold the fewest: Ray would wait for it for ever.
    """
    cluster, capacity = spec.cluster, _capacity(spec)
    count = min(capacity, cluster.max_workers)
    if cluster.min_workers == cluster.max_workers:
        return count
    if _joined() and cluster.placement in FREE_PLACEMENTS:  # of the others Ray cannot be asked one by one
        with _places(spec, cluster.max_workers) as granted:
            deadline = time.monotonic() + CLUSTER_WAIT_S
            while granted() < cluster.max_workers and time.monotonic() < deadline:
                time.sleep(POLL_S)
            count = max(granted(), cluster.min_workers)  # the fewest are waited for
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
    run_dir.stop.write_text("to go on with more workers")
    os.utime(run_dir.stop, (0, 0))


def _is_for_growth(run_dir: RunDir) -> bool:
    """Whether the request to stop is ours; whoever else asks, by a touch too, makes it his own."""
    return run_dir.stop.exists() and run_dir.stop.stat().st_mtime == 0


def _capacity(spec: RunSpec) -> int:
    """How many workers the nodes of the cluster can hold, whoever uses them now.

    Raises:
        UserError: fewer than the run must have.
    """
    import ray

    wanted = _resources(spec)
    deadline = time.monotonic() + (CLUSTER_WAIT_S if _joined() else 0)
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        per_node = [int(min(node.get(name, 0) // n for name, n in wanted.items() if n)) for node in nodes]
        fits = _placeable(per_node, spec.cluster.placement)
        if fits >= spec.cluster.min_workers:
            return fits
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    there = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in wanted) for node in nodes)
    raise _too_small(spec, f"{asked} each, placed {spec.cluster.placement}, and the cluster's nodes have {there}", fits)


def _placeable(per_node: list[int], placement: str) -> int:
    """How many workers a cluster holds under Ray's placement strategies, given how many each node would hold."""
    if placement == "STRICT_PACK":
        return max(per_node, default=0)
    if placement == "STRICT_SPREAD":
        return sum(1 for fits in per_node if fits)
    return sum(per_node)


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
