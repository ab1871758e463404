"""Submit a checked run to Slurm: the settings become flags of sbatch."""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import save_spec
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir

SETTINGS = "submitted.yaml"  # the resolved settings of the run, in its directory
# Paths in a checkout, and after installing a wheel.
BATCH_SCRIPTS = (
    Path(__file__).parents[2] / "slurm" / "train.sbatch",
    Path(sys.prefix) / "share" / "dpo-orchestrator" / "slurm" / "train.sbatch",
)


def submit_job(spec: RunSpec) -> int:
    """Submit the run with sbatch, with its size as flags; return 0 as soon as the job is queued.

    Raises:
        UserError: a worker's resources are not set, the run has started with other settings, or
            sbatch fails.
        ConnectionError: Slurm does not answer.
    """
    run_dir = RunDir(spec.run_dir)
    flags = slurm_flags(spec)
    run_dir.check(spec)
    script = _batch_script()
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    settings = run_dir.path / SETTINGS
    save_spec(spec, settings)
    command = ["sbatch", "--parsable", *flags, str(script), str(settings)]
    env = dict(os.environ)
    if sys.prefix != sys.base_prefix:
        env["VIRTUAL_ENV"] = sys.prefix  # the first place where the job looks for this program
    print(shlex.join(command))
    job = _sbatch(spec, command, env)
    folder, log = (
        shlex.quote(str(path)) for path in (spec.run_dir, run_dir.logs / f"slurm-{job}.log")
    )
    print(f"job      {job}\nstop     orchestrator stop {folder}")
    print(f"follow   tail -F {log}\nqueue    squeue --job {job}")
    return 0


def _batch_script() -> Path:
    """Return the script to queue.

    Raises:
        UserError: it is not installed.
    """
    script = next((path for path in BATCH_SCRIPTS if path.is_file()), None)
    if script is None:
        rule = f"there is no {' nor '.join(map(str, BATCH_SCRIPTS))}"
        checkout = "from a checkout (pip install --editable)"
        cure = f"install the project into a virtual environment, or {checkout}"
        raise UserError("--to", "slurm", rule, cure)
    return script


def slurm_flags(spec: RunSpec) -> list[str]:
    """Return the flags of sbatch for a run: nodes, resources per node, and the block `slurm`.

    Raises:
        UserError: the workers per node or the resources of a worker are not set.
    """
    slurm, cluster = spec.slurm, spec.cluster
    if not cluster.resources:
        rule = "is required: Slurm allocates only requested resources"
        cure = "for example cluster.resources={GPU: 1, CPU: 8}"
        raise UserError("cluster.resources", {}, rule, cure)
    each = _workers_per_node(spec)
    fewest, most = (math.ceil(count / each) for count in (cluster.min_workers, cluster.max_workers))
    gpus, cpus = (math.ceil(cluster.resources.get(name, 0) * each) for name in ("GPU", "CPU"))
    flags = {
        "job-name": spec.run.name,
        "nodes": str(most) if fewest == most else f"{fewest}-{most}",
        "gpus-per-node": str(gpus) if gpus else None,
        "cpus-per-task": str(cpus) if cpus else None,
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.signal_s}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "output": str(RunDir(spec.run_dir).logs).replace("%", "%%") + "/slurm-%j.log",
    }
    return [f"--{name}={value}" for name, value in flags.items() if value is not None] + slurm.args


def _workers_per_node(spec: RunSpec) -> int:
    cluster = spec.cluster
    if spec.slurm.workers_per_node is not None:
        return min(spec.slurm.workers_per_node, cluster.max_workers)
    if cluster.placement == "STRICT_SPREAD":
        return 1
    if cluster.placement == "STRICT_PACK" or cluster.max_workers == 1:
        return cluster.max_workers
    workers = f"{cluster.max_workers} workers with cluster.placement {cluster.placement}"
    cure = "set it to the GPUs of a node, for example 8"
    raise UserError("slurm.workers_per_node", None, f"is required for {workers}", cure)


def _sbatch(spec: RunSpec, command: list[str], env: dict[str, str]) -> str:
    """Run sbatch and return the number of the job.

    Raises:
        UserError: there is no sbatch, or it rejects the job.
        ConnectionError: Slurm does not answer.
    """
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        cure = "submit on a machine with Slurm's commands, such as a login node of the cluster"
        raise UserError("--to", "slurm", "there is no sbatch on PATH", cure) from None
    message = "; ".join(
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines()
    )
    if done.returncode == 0:
        if message:  # a warning
            print(f"sbatch: {message}", file=sys.stderr)
        return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER with several clusters
    if "slurm controller" in message:
        raise ConnectionError(f"sbatch: {message}")
    block = spec.slurm.model_dump(exclude_defaults=True)
    cure = "change this block, or cluster.resources"
    raise UserError("slurm", block, f"sbatch rejects the job: {message}", cure)
