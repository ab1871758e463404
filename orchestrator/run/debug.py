"""The worker in this process, or in N processes of this machine, with no Ray: breakpoints work."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

from orchestrator.engines.optim import Optimizers, check_functions
from orchestrator.models.reference import RefModel
from orchestrator.settings.spec import RunSpec
from orchestrator.training.health import LocalSession
from orchestrator.training.rundir import RunDir
from orchestrator.training.worker import RunResult, finished_already, prepare, run
from orchestrator.world import World, is_one_of_many

POLL_S = 0.1
OWNED = "ORCHESTRATOR_RUN_DIR_IS_OWNED"  # tells a rank that the process that started it holds the run directory
GRACE_S = 10.0  # seconds that other ranks get to end after one has failed


def debug(spec: RunSpec, ref_model: RefModel | None = None, optimizers: Optimizers | None = None) -> RunResult:
    """Run the worker here; under torchrun (RANK, WORLD_SIZE) as one rank of that world.

    ref_model: policy -> reference, instead of what the settings say.
    optimizers: (params -> optimizer, optimizer -> schedule), likewise; where one is None the settings say. params are
    groups, dicts with "params" and "weight_decay", and torch.optim.SGD(params, lr=1e-6) takes them as they are.

    Raises:
        UserError: the settings or the data are wrong.
        TrainingError: training cannot go on.
    """
    check_functions(optimizers)
    run_dir = RunDir(spec.run_dir)
    if is_one_of_many():
        return _as_rank(spec, run_dir, ref_model, optimizers)
    with run_dir.owned():
        run_dir.check(spec)
        if (done := finished_already(run_dir)) is not None:
            return done
        prepare(spec)
        run_dir.begin(spec)
        world = World.join(spec.cluster.collective_timeout_s)
        try:
            return run(spec, world, LocalSession(run_dir, world.rank), ref_model, optimizers)
        finally:
            world.leave()  # an engine may have met alone


def _as_rank(spec: RunSpec, run_dir: RunDir, ref_model: RefModel | None, optimizers: Optimizers | None) -> RunResult:
    world = World.join(spec.cluster.collective_timeout_s)
    try:
        with ExitStack() as held:
            done = None
            if world.is_main:
                if OWNED not in os.environ:
                    held.enter_context(run_dir.owned())
                run_dir.check(spec)
                done = finished_already(run_dir)
                if done is None:
                    run_dir.begin(spec)
            done = world.gather(done)[0]  # the directory exists
            return done or run(spec, world, LocalSession(run_dir, world.rank), ref_model, optimizers)
    finally:
        world.leave()


def debug_ranks(spec: RunSpec, ranks: int, command: list[str]) -> int:
    """Start `command` once for each rank of a world on this machine; returns the first exit code that is not 0.

    What can be refused is refused here, once, before any rank starts. When one rank fails the others are ended.
    """
    run_dir = RunDir(spec.run_dir)
    with run_dir.owned():
        run_dir.check(spec)
        if finished_already(run_dir) is not None:
            return 0
        prepare(spec)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), OWNED: "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        processes = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        return _wait(processes)


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    # Ctrl-C in a terminal reaches the ranks by itself; TERM, and INT sent to this process alone, is passed on
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward if not sys.stdin.isatty() else signal.SIG_IGN)
    failed_at: float | None = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() not in (None, 0, 3) for process in processes):
            failed_at = time.monotonic()
            forward(signal.SIGTERM, None)
        if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
            forward(signal.SIGKILL, None)
        time.sleep(POLL_S)
    codes = [code if code >= 0 else 1 for code in (process.returncode for process in processes)]  # below 0: a signal
    if 2 in codes:  # a refusal is the reason; its peers died of it
        return 2
    return next((code for code in codes if code not in (0, 3)), max(codes))
