"""Submit a checked run to the job server of a Ray cluster, and follow its log to the end."""

import asyncio
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.run.checks.parallel import one_line
from orchestrator.run.ray.stage import stage
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import DATA_KEYS, paths_in, save_spec
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SETTINGS = "submitted.yaml"  # the resolved settings of the run, in the job's working directory
POLL_S = 1.0
# Seconds without output after which the job's status is queried and, while it runs, the connection
# is renewed: a dead connection may not raise, and after a node was lost, Ray's can stay open after
# the job's end.
SILENCE_S = 30.0
AWAY_S = 600.0  # seconds that a job server may be unreachable


def submit_job(spec: RunSpec, address: str | None, wait: bool) -> int:
    """Submit the run with the working directory, print its log to the end; return its exit code.

    address: of the job server, http://HEAD:8265; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this
    machine. wait: False returns 0 as soon as the job is accepted.

    Raises:
        UserError: no job server answers or it denies access, or the working directory cannot be
            packaged.
        ConnectionError: the job server rejects the job, or becomes unreachable while its log is
            followed.
    """
    logging.disable(logging.INFO)  # else Ray logs packages and sockets
    client = _connect(address)
    # unique, unlike the run's name
    job = f"{spec.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        stage(spec, Path.cwd(), Path(folder))
        save_spec(spec, Path(folder, SETTINGS))
        try:  # nothing else in runtime_env: it is readable by all who can query the job
            client.submit_job(
                entrypoint=f"orchestrator train {SETTINGS}",
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
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job continues; to stop it: {stop}", flush=True)
        return 1
    return _exit_code(client, job)


def not_on_this_machine(spec: RunSpec) -> str | None:
    """Return the first data file whose folder is not here: a path of the cluster for the job."""
    for key, source in paths_in(spec, DATA_KEYS).items():
        if os.path.isabs(source) and not Path(source).parent.is_dir():
            return f"{key} = {source}"
    return None


def _exit_code(client: "JobSubmissionClient", job: str) -> int:
    """Return the exit code of a job that has ended; print why if it has none."""
    details = client.get_job_info(job)
    code = details.driver_exit_code
    # it never started, or was killed with its node or by `ray job stop`, which waits 3 s
    if code is None:
        reason = " ".join((details.message or details.status).split())
        print(f"error: job {job}: {reason}", file=sys.stderr)
        return 1
    return code if code >= 0 else 1  # below 0: a signal


def _connect(address: str | None) -> "JobSubmissionClient":
    """Return a client of the job server.

    Raises:
        UserError: no job server answers, or it denies access.
    """
    from ray.job_submission import JobSubmissionClient

    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it to the argument
    try:
        with _quiet():
            return JobSubmissionClient(address)
    except Exception as error:  # Ray has no specific type for a missing server or denied access
        rule = f"no job server accepts us ({one_line(error)})"
        head = "the head needs ray[default] and ray start --dashboard-host=0.0.0.0"
        token = "set RAY_AUTH_TOKEN_PATH here to a file with its token"
        cure = f"use --address http://HEAD:8265; {head}, and with RAY_AUTH_MODE=token {token}"
        raise UserError("--address", address, rule, cure) from None


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


async def follow(client: "JobSubmissionClient", job: str) -> None:
    """Print a job's log to its end; after a lost connection, continue where it was.

    Raises:
        ConnectionError: the job server is unreachable for longer than AWAY_S.
    """
    from aiohttp import ClientError

    away = (RuntimeError, OSError, ClientError)  # from Ray, a socket or requests, a handshake
    printed, answered, is_over = 0, time.monotonic(), False
    while True:
        is_complete, seen = False, 0  # a new connection repeats the log from its start
        with suppress(*away):
            async with asyncio.timeout(SILENCE_S) as patience:
                async for text in client.tail_job_logs(job):
                    patience.reschedule(asyncio.get_running_loop().time() + SILENCE_S)
                    print(text[max(0, printed - seen) :], end="", flush=True)
                    seen += len(text)
                    printed = max(printed, seen)
            is_complete = True
        # no more log will come, even if the connection broke: it may be lost with its node
        if is_over:
            return
        try:
            is_over, answered = client.get_job_status(job).is_terminal(), time.monotonic()
        except away as error:
            if time.monotonic() > answered + AWAY_S:
                lost = f"the job server has not answered for {AWAY_S:g} s ({one_line(error)})"
                logs = f"ray job logs --follow {job}"
                raise ConnectionError(f"{lost}; the job may continue: {logs}") from None
        if is_over and is_complete:
            return
        await asyncio.sleep(POLL_S)
