"""A real Slurm over `nodes.Nodes`: Debian's munged, slurmctld and a slurmd on each node, in two
seconds.

The nodes claim more CPUs than there are, and GPUs that are not there: both are only counted. Two
partitions: batch (the default), whose jobs are requeued when one of high wants their nodes.
"""

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from support.cluster_nodes import Nodes, wait_until, why_not
from support.timeouts import scaled_timeout

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ps")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
)
CGROUPS = Path("/sys/fs/cgroup/freezer")

# cred_expire: seconds that a requeued job waits before it may start again (120 by default)
# config_overrides: what this file says of a node counts, not what is there
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
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=20
DefMemPerCPU=100
MailProg=/bin/true
"""
PARTITIONS = """
PartitionName=batch Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 \
PreemptMode=REQUEUE GraceTime=10
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
        return f"{', '.join(missing)} is missing: apt-get install slurm-wlm procps"
    return why_not() or (
        None
        if CGROUPS.is_dir()
        else f"{CGROUPS} is missing: cgroup v1 keeps track of a job's processes"
    )


class Slurm:
    """Slurm over nodes of so many CPUs and GPUs each; its commands are given on the controller, as
    on a login node.
    """

    def __init__(self, nodes: Nodes, cpus: int = 64, gpus: int = 8) -> None:
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        self.folder = nodes.folder / "slurm"
        self.conf = self.folder / "slurm.conf"
        self.cgroups = CGROUPS / f"{nodes.folder.name}-{os.getpid()}"

    def __enter__(self) -> "Slurm":
        nodes = self.nodes
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        lines = [SLURM_CONF.format(controller=nodes.address["ctl"], folder=self.folder)]
        each = f"CPUs={self.cpus} RealMemory=8000 Gres=gpu:{self.gpus}"
        lines += [f"NodeName={name} NodeAddr={nodes.address[name]} {each}" for name in nodes.names]
        lines += [PARTITIONS.format(nodes=",".join(nodes.names))]
        self.conf.write_text("\n".join(lines))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        for number in range(self.gpus):
            (self.folder / f"gpu{number}").touch()  # stands for a device
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n"
        )
        self.cgroups.mkdir()
        self._munge("ctl")
        self._do("ctl", "slurmctld")
        for name in nodes.names:
            self._slurmd(name)
        for name in nodes.names:
            self._wait_for(name)
        return self

    def __exit__(self, *_: object) -> None:
        self.nodes.close()
        for folder, _, _ in os.walk(self.cgroups, topdown=False):  # Slurm leaves them behind
            with suppress(OSError):
                os.rmdir(folder)

    def power_cut(self, name: str) -> None:
        """A node is gone, and Slurm hears of it at once, as from a cluster's health check."""
        self.nodes.down(name)
        self._do("ctl", "scontrol", "update", f"nodename={name}", "state=down", "reason=power")

    def power_on(self, name: str) -> None:
        """It is back."""
        self.nodes.up(name)
        self._slurmd(name, "-b")
        self._wait_for(name)

    def processes(self, name: str) -> list[str]:
        """Command lines on a node besides those that are there without a job."""
        lines = self.nodes.run(name, "ps", "-A", "-o", "pid=,args=").stdout.splitlines()
        commands = [command.split(maxsplit=1) for command in lines]
        daemons = ("munged", "slurmd ", "ps -A")
        return [args for pid, args in commands if pid != "1" and not args.startswith(daemons)]

    def state_of_node(self, name: str) -> str:
        """As sinfo says it."""
        states = self.run("sinfo", "-h", "-n", name, "-o", "%T").stdout.split()
        return states[0] if states else ""

    def run(
        self,
        *command: str | Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return self.nodes.run(
            "ctl",
            *command,
            env={**(env or os.environ), "SLURM_CONF": str(self.conf)},
            cwd=cwd,
            timeout=timeout,
        )

    def sbatch(
        self, *words: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """Submit; returns the job's number."""
        done = self.run("sbatch", "--parsable", *words, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """Return scontrol's view of a job: JobState, ExitCode ("code:signal"), Restarts, Reason,
        ...
        """
        output = self.run("scontrol", "-o", "show", "job", str(number)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", output))

    def ended(self, number: int, seconds: float = 240) -> dict[str, str]:
        """Wait until a job has ended and none of its processes is left; what scontrol then says."""
        deadline = time.monotonic() + scaled_timeout(seconds)
        while (job := self.job(number)).get("JobState") not in ENDED:
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job

    def _munge(self, name: str) -> None:
        # munged refuses to run as root, and its socket must be where every client looks; a node
        # comes to see it anew
        self._do(
            name, "bash", "-c", "mkdir -p /run/munge && mount -t tmpfs -o mode=755 tmpfs /run/munge"
        )
        self._do(name, "chown", "munge:munge", "/run/munge")
        self._do(name, "setpriv", "--reuid", "munge", "--regid", "munge", "--init-groups", "munged")

    def _slurmd(self, name: str, *flags: str) -> None:
        self._munge(name)
        # two such clusters have nodes and jobs of the same names
        self._do(name, "mount", "--bind", str(self.cgroups), str(CGROUPS))
        self._do(name, "slurmd", *flags, "-N", name)

    def _wait_for(self, name: str) -> None:
        wait_until(lambda: self.state_of_node(name) == "idle", 60)

    def _do(self, name: str, *command: str) -> None:
        done = self.nodes.run(name, *command, env={**os.environ, "SLURM_CONF": str(self.conf)})
        assert done.returncode == 0, (name, command, done.stderr)
