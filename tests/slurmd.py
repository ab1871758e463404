"""A real Slurm over `nodes.Nodes`: Debian's munged, slurmctld and a slurmd on each node, in two seconds.

Two partitions: batch (the default), whose jobs are requeued when one of high wants their nodes.
"""

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from nodes import Nodes, wait_until, why_not

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
CGROUPS = Path("/sys/fs/cgroup/freezer")

# cred_expire: seconds that a requeued job waits before it may start again (120 by default)
SLURM_CONF = """
ClusterName=tests
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=20
DefMemPerCPU=1000
MailProg=/bin/true
"""
PARTITIONS = """
PartitionName=batch Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes={nodes} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
CGROUP_CONF = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


def why_no_slurm() -> str | None:
    """Why there can be no Slurm here, or None."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is missing: apt-get install slurm-wlm"
    return why_not() or (
        None if CGROUPS.is_dir() else f"{CGROUPS} is missing: cgroup v1 keeps track of a job's processes"
    )


class Slurm:
    """Slurm over nodes of two CPUs each; commands of it are given on the controller, as on a login node."""

    def __init__(self, nodes: Nodes, cpus: int = 2) -> None:
        self.nodes, self.cpus = nodes, cpus
        self.folder = nodes.folder / "slurm"
        self.conf = self.folder / "slurm.conf"

    def __enter__(self) -> "Slurm":
        nodes = self.nodes
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        lines = [SLURM_CONF.format(controller=nodes.address["ctl"], folder=self.folder)]
        lines += [f"NodeName={n} NodeAddr={nodes.address[n]} CPUs={self.cpus} RealMemory=8000" for n in nodes.names]
        lines += [PARTITIONS.format(nodes=",".join(nodes.names))]
        self.conf.write_text("\n".join(lines))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        # munged refuses to run as root, and its socket must be where every client looks; nodes come to see it anew
        for name in ("ctl", *nodes.names):
            self._do(name, "bash", "-c", "mkdir -p /run/munge && mount -t tmpfs -o mode=755 tmpfs /run/munge")
            self._do(name, "chown", "munge:munge", "/run/munge")
            self._do(name, "setpriv", "--reuid", "munge", "--regid", "munge", "--init-groups", "munged")
        self._do("ctl", "slurmctld")
        for name in nodes.names:
            self.start(name)
        return self

    def __exit__(self, *_: object) -> None:
        self.nodes.close()
        for name in self.nodes.names:  # Slurm leaves it behind, empty
            with suppress(OSError):
                (CGROUPS / f"slurm_{name}").rmdir()

    def start(self, name: str) -> None:
        """Start slurmd on a node and wait until the node is idle."""
        self._do(name, "slurmd", "-N", name)
        wait_until(lambda: self.state_of_node(name) == "idle", 60)

    def state_of_node(self, name: str) -> str:
        """As sinfo says it."""
        states = self.run("sinfo", "-h", "-n", name, "-o", "%T").stdout.split()
        return states[0] if states else ""

    def run(
        self, *command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return self.nodes.run(
            "ctl", *command, env={**(env or os.environ), "SLURM_CONF": str(self.conf)}, cwd=cwd, timeout=timeout
        )

    def sbatch(self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> int:
        """Submit; returns the job's number."""
        done = self.run("sbatch", "--parsable", *words, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode ("code:signal"), Restarts, Reason, ..."""
        said = self.run("scontrol", "-o", "show", "job", str(number)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def ended(self, number: int, seconds: float = 240) -> dict[str, str]:
        """Wait until a job has ended and none of its processes is left; what scontrol then says."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") not in ENDED:
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job

    def _do(self, name: str, *command: str) -> None:
        done = self.nodes.run(name, *command, env={**os.environ, "SLURM_CONF": str(self.conf)})
        assert done.returncode == 0, (name, command, done.stderr)
