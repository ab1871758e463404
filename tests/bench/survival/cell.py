"""One run of a system with one fault: start it as its users do, watch it, close all that it
started, and measure.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import injector
import psutil
import task
import torch
from injector import Fault, free_disk
from safetensors.torch import load_file
from systems import HERE, System

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.1
GRACE_S = 30.0  # between SIGTERM and SIGKILL of a preemption, as on Kubernetes
DISK = "16m"  # of the tmpfs of a run whose disk becomes full
LINE = 100  # characters of a line that are shown
ROOT = HERE.parents[2]
NOT_INHERITED = ("RAY_ADDRESS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SAME_FOR_ALL = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
    "PYTHONUNBUFFERED": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves ranks on a busy machine
    "TOKENIZERS_PARALLELISM": "false",
}
# No line of an answer to a fault: what a shell shows of a rule, of a progress bar, of nothing
EMPTY = re.compile(r"[\s=\-─━*.]*$")


def run(system: System, name: str, folder: Path, bound_s: float) -> dict[str, Any]:
    """Run a system with a fault in an empty folder, and return what was measured.

    bound_s: seconds without any event of the run after which it is ended.
    """
    fault = injector.FAULTS[name]
    (folder / "work").mkdir(parents=True)
    plan = {"fault": name, "checkpoints": system.checkpoints}
    (folder / "plan.json").write_text(json.dumps(plan))
    with small_disk(folder / "work", fault) as reason:
        if reason:
            return {"not_run": reason}
        attempts = Attempts(system, fault, folder, bound_s)
        ended = attempts.all()
        return measured(system, fault, folder, attempts.log) | ended


@contextmanager
def small_disk(work: Path, fault: Fault) -> Iterator[str]:
    """Mount a small tmpfs for a fault that fills the disk; yield why it cannot be, or nothing."""
    if fault.action != "fill_disk":
        yield ""
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "survival", str(work)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        yield f"no tmpfs can be mounted: {mounted.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", str(work)], check=True)


class Attempts:
    """The attempts of one run: each is the user's command, started again as its users do."""

    def __init__(self, system: System, fault: Fault, folder: Path, bound_s: float) -> None:
        self.system, self.fault, self.folder, self.bound_s = system, fault, folder, bound_s
        self.log: list[tuple[float, str]] = []  # when each line was read
        self.codes: list[int | None] = []

    def all(self) -> dict[str, Any]:
        """Start attempts until the run has finished or nobody would start another."""
        failures, preempted, why = 0, False, ""
        while True:
            code, why = self._one()
            self.codes.append(code)
            if why:  # ended by this harness
                break
            if self._was_preempted() and not preempted and not self._is_finished():
                preempted = True  # the scheduler starts the job again, whatever its exit code
                continue
            failures += code != 0
            if code == 0 or not self.system.in_shell_loop or failures > task.RESTARTS:
                break
        return {"exit_codes": self.codes, "ended_because": why}

    def _is_finished(self) -> bool:
        steps = [e["step"] for e in injector.events(self.folder) if e["kind"] == "done"]
        return max(steps, default=0) >= task.STEPS

    def _was_preempted(self) -> bool:
        seen = injector.events(self.folder)
        return self.fault.action == "preempt" and any(e["kind"] == "fault" for e in seen)

    def _one(self) -> tuple[int | None, str]:
        """Run the command once; return its exit code, and why it was ended, if it was."""
        free_disk(self.folder)
        inherited = {key: os.environ[key] for key in os.environ if key not in NOT_INHERITED}
        launcher = subprocess.Popen(
            self.system.command(self.folder),
            env={
                **inherited,
                **SAME_FOR_ALL,
                **self.system.environment,
                injector.CELL: str(self.folder),
                # DeepSpeed compiles an operation once, in its undisturbed run
                "TORCH_EXTENSIONS_DIR": os.environ[task.TASK] + "/extensions",
            },
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        (self.folder / "launcher.pid").write_text(str(launcher.pid))
        reader = threading.Thread(target=self._read, args=(launcher,), daemon=True)
        reader.start()
        try:
            return self._watched(launcher)
        finally:
            close_descendants()
            launcher.wait()
            reader.join(5)

    def _read(self, launcher: subprocess.Popen[bytes]) -> None:
        assert launcher.stdout is not None
        with open(self.folder / "log.txt", "ab", buffering=0) as copy:
            for line in launcher.stdout:
                copy.write(line)
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.decode(errors="replace"))
                for part in re.split(r"[\r\n]", text):
                    if not EMPTY.match(part):
                        self.log.append((time.time(), part.strip()))

    def _watched(self, launcher: subprocess.Popen[bytes]) -> tuple[int | None, str]:
        began, moved, size = time.time(), time.monotonic(), -1
        events = self.folder / "events.jsonl"
        first = not self.codes
        while launcher.poll() is None:
            if events.exists() and (now := events.stat().st_size) != size:
                moved, size = time.monotonic(), now
            if time.monotonic() - moved > self.bound_s:
                return None, f"no sign of life for {self.bound_s:.0f} s"
            if first and self._was_preempted():
                seen = [e["time"] for e in injector.events(self.folder) if e["kind"] == "fault"]
                if time.time() - max(began, *seen) > GRACE_S:
                    return None, ""  # the SIGKILL of a preemption
            time.sleep(POLL_S)
        return launcher.returncode, ""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none is lost."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def close_descendants() -> None:
    """SIGKILL every descendant of this process by its id, until there is none."""
    for _ in range(50):
        alive = [
            each
            for each in psutil.Process().children(recursive=True)
            if each.status() != psutil.STATUS_ZOMBIE
        ]
        if not alive:
            break
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        psutil.wait_procs(alive, timeout=0.2)


def measured(
    system: System, fault: Fault, folder: Path, log: list[tuple[float, str]]
) -> dict[str, Any]:
    """Return the measures of an ended run."""
    seen = injector.events(folder)
    steps = [e["step"] for e in seen if e["kind"] == "done"]
    at = max((e["time"] for e in seen if e["kind"] in ("fault", "killed")), default=None)
    after = [e for e in seen if at is not None and e["time"] > at]
    # the first step that nobody had taken; a preempted run may take some before it ends
    again = max((e["time"] for e in after if e["kind"] == "start" and e["rank"] == 0), default=0.0)
    taken = [e["step"] for e in seen if e["kind"] == "done" and e["time"] < again]
    first = max([fault.new_step, *(step + 1 for step in taken)])
    new = (e for e in after if e["time"] > again and e["kind"] == "done" and e["step"] >= first)
    known = next((e["time"] for e in new), None)
    restarted = (e["time"] for e in after if e["kind"] in ("alive", "start"))
    weights = folder / system.weights
    digest, finite = weights_of(weights) if weights.exists() else (None, False)
    return {
        "fault_at": at,
        "last_step": max(steps, default=0),
        "again": len(steps) - len(set(steps)),
        "seconds": None if at is None or known is None else known - at,
        "sha256": digest,
        "finite": finite,
        "damaged": next((e["file"] for e in seen if e["kind"] == "damaged"), None),
        "answer": answer(system, log, at, next(restarted, known)),
        "last_line": next(speaking(system, (line for _, line in reversed(log))), ""),
    }


def answer(
    system: System, log: list[tuple[float, str]], at: float | None, until: float | None
) -> str:
    """Return the last line that a user reads after a fault and before ranks start again."""
    if at is None:
        return ""
    lines = [line for when, line in log if at <= when <= (until or when)]
    return next(speaking(system, reversed(lines)), "")


def speaking(system: System, lines: Iterable[str]) -> Iterator[str]:
    """Leave out lines of progress."""
    return (line for line in lines if not re.search(system.progress, line))


def weights_of(path: Path) -> tuple[str, bool]:
    """Return a hash of the tensors of a file, and whether all are finite."""
    digest, finite = hashlib.sha256(), True
    for name, value in sorted(load_file(path).items()):
        digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
        finite = finite and bool(value.isfinite().all())
    return digest.hexdigest(), finite
