"""Run the worker on one rank of Ray Train, and record how it ended where it outlives Ray."""

import logging
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from orchestrator.run.ray.logs import rank_log
from orchestrator.run.ray.objects import unpickled_objects
from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.settings.load import make_spec
from orchestrator.training.checkpoint_writer import SaveFailed
from orchestrator.training.deaths import record_crashes
from orchestrator.training.export import ExportFailed
from orchestrator.training.manifest import ReadFailed
from orchestrator.training.ownership import TOKEN
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import LocalSession
from orchestrator.training.watchdog import Watchdog, watched
from orchestrator.training.worker import run
from orchestrator.world import World

logger = logging.getLogger(__name__)


def worker_loop(config: dict[str, Any]) -> None:
    """Run the worker on one rank of Ray Train; write its outcome to RUN_DIR/result.json."""
    if config["cwd"] not in sys.path:
        sys.path.insert(0, config["cwd"])  # the user's callbacks and collators
    if config["owner"]:
        os.environ[TOKEN] = config["owner"]
    spec = make_spec(config["spec"])
    run_dir = RunDir(spec.run_dir)
    world = World.join(spec.cluster.collective_timeout_s, config["use_gpu"])
    path = rank_log(run_dir, world.rank)
    with (
        open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        logging.basicConfig(
            stream=log, level=logging.WARNING, format="%(levelname)s: %(message)s", force=True
        )
        try:
            record_crashes(run_dir, world.rank)
            _print_nodes(world)
            # Checkpoints are not reported to Ray: it accepts only those in its own folder, waits up
            # to 2 s for each report, and can lose its record of them in a crash. Manifests record
            # which exist.
            user = unpickled_objects(config["objects"], world)
            with watched(Watchdog(run_dir, world, spec, _end)) as watchdog:
                run(spec, world, LocalSession(run_dir, world.rank, watchdog), user)
        except UserError as error:
            parts = [error.key, error.value, error.rule, error.cure]
            run_dir.write_result({"status": "refused", "error": parts})
            raise
        except TrainingError as error:
            run_dir.write_result({"status": "failed", "reason": str(error)})
            raise
        except (ReadFailed, SaveFailed, ExportFailed) as error:
            logger.error("%s", error)
            raise
        except BaseException:
            traceback.print_exc()  # to this rank's log; the driver prints only that a worker died
            raise


def _end(line: str, reports: bool) -> None:
    """End this process, whose run hangs; the driver resumes the run."""
    # to this rank's log; the driver reads RUN_DIR/logs/hang.txt
    print(f"error: {line}", flush=True)
    os._exit(1)


def _print_nodes(world: World) -> None:
    """Print one line with the ranks of each node, by its address in the cluster."""
    import ray

    nodes: dict[str, list[int]] = {}
    here = f"{ray.util.get_node_ip_address()} ({os.uname().nodename})"
    for rank, node in enumerate(world.gather(here)):
        nodes.setdefault(node, []).append(rank)
    if world.is_main:
        texts = (
            f"{ranks[0]}-{ranks[-1]} on {node}" if len(ranks) > 1 else f"{ranks[0]} on {node}"
            for node, ranks in nodes.items()
        )
        print(f"ranks: {'; '.join(texts)}", flush=True)
