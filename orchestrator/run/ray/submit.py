"""Submit a checked run to the job server of a Ray cluster, or to Slurm."""

import asyncio
import fnmatch
import logging
import math
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.run.checks.probe import one_line
from orchestrator.settings.load import DATA_KEYS, FOLDER_KEYS, PATH_KEYS, paths_in, save_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.rundir import RunDir

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SUBMITTED = "submitted.yaml"  # the resolved settings of the run
# Not copied from the working directory, besides what the settings name and git ignores: files that
# no job needs, secrets, and .gitignore, which Ray would apply and might then omit the settings.
LEFT_OUT = (
    ".git",
    ".gitignore",
    ".env",
    ".env.*",
    ".netrc",
    ".venv",
    "venv",
    "wandb",
    "__pycache__",
    "*.egg-info",
)
LIMIT_BYTES = 500 * 2**20  # maximum size of a package in Ray

POLL_S = 1.0
# Seconds without output after which the job's status is queried and, while it runs, the connection
# is renewed: a dead connection may not raise, and after a node was lost, Ray's can stay open after
# the job's end.
SILENCE_S = 30.0
AWAY_S = 600.0  # seconds that a job server may be unreachable


# --- a Ray cluster --------------------------------------------------------------------------------


def to_ray(spec: RunSpec, address: str | None, wait: bool) -> int:
    """Submit the run with the working directory to a job server, print its log to the end, and
    return its exit code.

    address: of the job server, http://HEAD:8265; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this
    machine. wait: False returns 0 as soon as the job is accepted.

    Raises:
        UserError: no job server answers or it denies access, or the working directory cannot be
            packaged.
        ConnectionError: the job server rejects the job, or becomes unreachable while its log is
            followed.
    """
    logging.disable(logging.INFO)  # else Ray logs packages and sockets
    client = _client(address)
    # unique, unlike the run's name
    job = f"{spec.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        stage(spec, Path.cwd(), Path(folder))
        save_spec(spec, Path(folder, SUBMITTED))
        try:  # nothing else in runtime_env: it is readable by all who can query the job
            client.submit_job(
                entrypoint=f"orchestrator train {SUBMITTED}",
                submission_id=job,
                runtime_env={"working_dir": folder},
            )
        except RuntimeError as error:
            raise ConnectionError(f"the job server rejects the job: {one_line(error)}") from None
    stop = f"orchestrator stop {shlex.quote(str(spec.run_dir))}"
    print(f"job      {job}\nstop     {stop}\nfollow   ray job logs --follow {job}", flush=True)
    if not wait:
        return 0
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job continues; to stop it: {stop}", flush=True)
        return 1
    details = client.get_job_info(job)
    code = details.driver_exit_code
    if (
        code is None
    ):  # it never started, or was killed with its node or by `ray job stop`, which waits 3 s
        print(
            f"error: job {job}: {' '.join((details.message or details.status).split())}",
            file=sys.stderr,
        )
        return 1
    return code if code >= 0 else 1  # below 0: a signal


def not_on_this_machine(spec: RunSpec) -> str | None:
    """Return the first data file whose folder does not exist here: a path of the cluster, which the
    job checks.
    """
    for key, source in paths_in(spec, DATA_KEYS).items():
        if os.path.isabs(source) and not Path(source).parent.is_dir():
            return f"{key} = {source}"
    return None


def _client(address: str | None) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it to the argument
    try:
        with _quiet():
            return JobSubmissionClient(address)
    except Exception as error:  # Ray has no specific type for a missing server or denied access
        cure = (
            "use --address http://HEAD:8265; the head needs ray[default] and ray start "
            "--dashboard-host=0.0.0.0, and with RAY_AUTH_MODE=token set RAY_AUTH_TOKEN_PATH here "
            "to a file with its token"
        )
        raise UserError(
            "--address", address, f"no job server accepts us ({one_line(error)})", cure
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what Ray's C++ code writes to stderr: no setting for it reaches a client."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


async def _follow(client: "JobSubmissionClient", job: str) -> None:
    """Print a job's log to its end; after a lost connection, continue where it was.

    Raises:
        ConnectionError: the job server is unreachable for longer than AWAY_S.
    """
    from aiohttp import ClientError

    away = (RuntimeError, OSError, ClientError)  # from Ray, a socket or requests, a handshake
    printed, answered, is_over = 0, time.monotonic(), False
    while True:
        is_whole, seen = False, 0  # a new connection repeats the log from its start
        with suppress(*away):
            async with asyncio.timeout(SILENCE_S) as patience:
                async for text in client.tail_job_logs(job):
                    patience.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                    print(text[max(0, printed - seen) :], end="", flush=True)
                    seen += len(text)
                    printed = max(printed, seen)
            is_whole = True
        if (
            is_over
        ):  # no more log will come, even if the connection broke: it may be lost with its node
            return
        try:
            is_over, answered = client.get_job_status(job).is_terminal(), time.monotonic()
        except away as error:
            if time.monotonic() > answered + AWAY_S:
                lost = f"the job server has not answered for {AWAY_S:g} s ({one_line(error)})"
                raise ConnectionError(
                    f"{lost}; the job may continue: ray job logs --follow {job}"
                ) from None
        if is_over and is_whole:
            return
        await asyncio.sleep(POLL_S)


def stage(spec: RunSpec, source: Path, target: Path) -> None:
    """Copy what a job needs from the working directory: code, but no data, models, outputs or
    secrets.

    Links to folders are not followed; unreadable files are skipped.

    Raises:
        UserError: the copy is larger than Ray allows, or a name cannot be in a package.
    """
    source = source.resolve()
    left_out = {path.resolve() for path in _named_by_settings(spec)} | set(_ignored_by_git(source))
    sizes: dict[str, int] = {}  # bytes by the first name below source
    for folder, subfolders, files in os.walk(source):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not _is_left_out(here / name, left_out)]
        for name in files:
            path = here / name
            if (
                _is_left_out(path, left_out)
                or not os.path.isfile(path)
                or not os.access(path, os.R_OK)
            ):
                continue
            inside = path.relative_to(source)
            if not _is_unicode(inside):
                rule = f"contains {str(inside)!r}, whose name is not UTF-8"
                raise UserError(
                    "working directory",
                    str(source),
                    rule,
                    "add it to .gitignore, or move it elsewhere",
                )
            sizes[inside.parts[0]] = sizes.get(inside.parts[0], 0) + path.stat().st_size
            if sum(sizes.values()) > LIMIT_BYTES:
                largest = max(sizes, key=lambda part: sizes[part])
                rule = (
                    f"contains more than {LIMIT_BYTES >> 20} MB besides data and outputs, most "
                    f"of it in {largest}"
                )
                raise UserError(
                    "working directory",
                    str(source),
                    rule,
                    f"add {largest} to .gitignore, or move it elsewhere",
                )
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / inside)


def _is_left_out(path: Path, left_out: set[Path]) -> bool:
    """Return whether a path, or its target if it is a link, is excluded from the copy."""
    both = (path, path.resolve())
    return not left_out.isdisjoint(both) or any(
        fnmatch.fnmatch(each.name, pattern) for each in both for pattern in LEFT_OUT
    )


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _named_by_settings(spec: RunSpec) -> Iterator[Path]:
    """Yield data, models and outputs: a job reads them at the paths in the settings, not from the
    copy.
    """
    yield from (spec.run_dir, spec.cache_dir)  # not run.dir, which may be the working directory
    yield from map(Path, paths_in(spec, FOLDER_KEYS + PATH_KEYS).values())


def _ignored_by_git(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that git ignores; none outside a repository.

    Raises:
        UserError: git fails; ignored files may be large or secret, so they must be known.
    """
    command = [
        "git",
        "ls-files",
        "--others",
        "--ignored",
        "--exclude-standard",
        "--directory",
        "-z",
    ]
    env = {**os.environ, "LC_ALL": "C"}  # its messages are parsed below
    try:
        listed = subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    except FileNotFoundError:  # no git
        return
    message = os.fsdecode(listed.stderr)
    if listed.returncode and "not a git repository" not in message:
        reason = " ".join(message.split())[:200]
        cure = "fix that, or submit from a copy without .git"
        raise UserError(
            "working directory",
            str(folder),
            f"git cannot list ignored files there ({reason})",
            cure,
        )
    for name in os.fsdecode(listed.stdout).split("\0"):
        if name:
            yield folder / name.rstrip("/")


# --- Slurm ----------------------------------------------------------------------------------------

# Paths in a checkout, and after installing a wheel.
BATCH_SCRIPTS = (
    Path(__file__).parents[3] / "slurm" / "train.sbatch",
    Path(sys.prefix) / "share" / "dpo-orchestrator" / "slurm" / "train.sbatch",
)


def to_slurm(spec: RunSpec) -> int:
    """Submit the run with sbatch, with its size as flags; return 0 as soon as the job is queued.

    Raises:
        UserError: a worker's resources are not set, the run has started with other settings, or
            sbatch fails.
        ConnectionError: Slurm does not answer.
    """
    run_dir = RunDir(spec.run_dir)
    flags = slurm_flags(spec)
    run_dir.check(spec)
    script = next((path for path in BATCH_SCRIPTS if path.is_file()), None)
    if script is None:
        cure = (
            "install the project into a virtual environment, or from a checkout (pip install "
            "--editable)"
        )
        raise UserError(
            "--to", "slurm", f"there is no {' nor '.join(map(str, BATCH_SCRIPTS))}", cure
        )
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    settings = run_dir.path / SUBMITTED
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
    print(
        f"job      {job}\nstop     orchestrator stop {folder}\nfollow   tail -F {log}\nqueue    "
        f"squeue --job {job}"
    )
    return 0


def slurm_flags(spec: RunSpec) -> list[str]:
    """Return the flags of sbatch for a run: nodes, resources per node, and the block `slurm`.

    Raises:
        UserError: the workers per node or the resources of a worker are not set.
    """
    slurm, cluster = spec.slurm, spec.cluster
    if not cluster.resources:
        cure = "for example cluster.resources={GPU: 1, CPU: 8}"
        raise UserError(
            "cluster.resources", {}, "is required: Slurm allocates only requested resources", cure
        )
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
    rule = (
        f"is required for {cluster.max_workers} workers with cluster.placement {cluster.placement}"
    )
    raise UserError(
        "slurm.workers_per_node", None, rule, "set it to the GPUs of a node, for example 8"
    )


def _sbatch(spec: RunSpec, command: list[str], env: dict[str, str]) -> str:
    """Run sbatch and return the number of the job."""
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
    raise UserError(
        "slurm",
        block,
        f"sbatch rejects the job: {message}",
        "change this block, or cluster.resources",
    )
