"""Nodes of a cluster on one host: namespaces with address, hostname, processes, /dev/shm and
/tmp/ray of their own, and a real Ray over them.

Needs root and iproute2. Nothing of it shows on the host, and the kernel ends every process in it
with the `with` block, or with the process of the tests.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.timeouts import scaled_timeout

NETWORK = "10.77.0"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
RAY_START_S = 120.0  # seconds that a node has to join; on a busy machine it needs 10 to 30

# Process 1 of each namespace sets it up, says so, reaps orphans and ends when its standard input
# does.
COMMON = """
set -e
hostname "$1"
mount -t proc proc /proc
ip link set lo up
"""
CONTROLLER = (
    COMMON
    + """
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/resolv.conf" /etc/resolv.conf
ip link add br0 type bridge
ip addr add "$3/24" dev br0
ip link set br0 up
echo ready
read -r _ || true
"""
)
NODE = (
    COMMON
    + """
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
until ip link show eth0 >/dev/null 2>&1; do read -r -t 0.05 _ || true; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
ip route add default via "$4"
echo ready
read -r _ || true
"""
)


def why_not() -> str | None:
    """Why there can be no nodes here, or None."""
    if os.geteuid() != 0:
        return "nodes are network namespaces: only root can make them"
    missing = [
        name for name in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(name) is None
    ]
    if missing:
        return f"{', '.join(missing)} is missing: apt-get install iproute2 util-linux"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, check=False
    )
    return (
        None
        if tried.returncode == 0
        else f"namespaces cannot be made here: {tried.stderr.decode().strip()}"
    )


class Nodes:
    """A controller ("ctl") and nodes n1, n2, ... joined by a bridge; all see the host's files.

    folder: for hosts and logs, private to these nodes.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder = folder
        self.names = [f"n{i + 1}" for i in range(count)]
        self.address = {"ctl": f"{NETWORK}.1"} | {
            name: f"{NETWORK}.{11 + i}" for i, name in enumerate(self.names)
        }
        self._first: dict[str, int] = {}  # process 1 of each, as the host numbers it
        self._holders: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Nodes":
        self.folder.mkdir(parents=True, exist_ok=True)
        hosts = [
            "127.0.0.1 localhost",
            *(f"{address} {name}" for name, address in self.address.items()),
        ]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # a server that cannot be reached would stall gRPC
        (self.folder / "resolv.conf").write_text("")
        try:
            words = [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--net",
                "--pid",
                "--mount",
                "--uts",
            ]
            self._hold("ctl", words, CONTROLLER, depth=1)
            for name in self.names:
                self.up(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything; the controller's process 1 takes all others with it."""
        for name in [*self.names, "ctl"]:
            self.down(name)

    def up(self, name: str) -> None:
        """Start a node; with a name of before, as a replacement of that one."""
        words = [*self._enter("ctl"), "unshare", "--net", "--pid", "--mount", "--uts", "--ipc"]
        self._hold(name, words, NODE, depth=2)

    def down(self, name: str) -> None:
        """A node loses its power: every process on it is gone, and nobody is told."""
        holder = self._holders.pop(name, None)
        if holder is None:
            return
        # first: dying processes would still close their connections
        if name != "ctl" and name in self._first:
            subprocess.run(
                [*self._network("ctl"), "ip", "link", "delete", self._link(name)], check=True
            )
        holder.kill()
        first = self._first.pop(name, None)
        if first is not None:
            kill_and_wait(first)
        holder.wait()

    def popen(
        self, name: str, *command: str | Path, cwd: Path | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command on a node; options are those of subprocess.Popen."""
        return subprocess.Popen(self._there(name, command, cwd), text=True, **options)

    def run(
        self,
        name: str,
        *command: str | Path,
        cwd: Path | None = None,
        timeout: float = 240,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end; stdout and stderr as text."""
        words = self._there(name, command, cwd)
        return subprocess.run(
            words,
            text=True,
            capture_output=True,
            timeout=scaled_timeout(timeout),
            check=False,
            **options,
        )

    def _there(self, name: str, command: Sequence[str | Path], cwd: Path | None) -> list[str]:
        return [*self._enter(name), "env", "-C", str(cwd or Path.cwd()), *map(str, command)]

    def _enter(self, name: str) -> list[str]:
        target = str(self._first[name])
        return ["nsenter", "--target", target, "--net", "--pid", "--mount", "--uts", "--ipc", "--"]

    def _network(self, name: str) -> list[str]:
        """Into the network of a node alone: process ids stay the host's."""
        return ["nsenter", "--target", str(self._first[name]), "--net", "--"]

    def _link(self, name: str) -> str:
        return f"v{self.address[name].rpartition('.')[2]}"

    def _hold(self, name: str, words: list[str], script: str, depth: int) -> None:
        """Start process 1 of a namespace and wait until it is set up.

        depth: how many processes stand between the one started here and process 1.
        """
        arguments = [name, str(self.folder), self.address[name], self.address["ctl"]]
        with open(self.folder / f"{name}.log", "a") as log:
            holder = subprocess.Popen(
                [*words, "--fork", "--kill-child", "bash", "-c", script, "bash", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._holders[name] = holder
        first = holder.pid
        for _ in range(depth):
            first = only_child(first)
        self._first[name] = first
        if name != "ctl":
            wait_until(
                lambda: (
                    os.readlink(f"/proc/{first}/ns/net")
                    != os.readlink(f"/proc/{self._first['ctl']}/ns/net")
                )
            )
            link = self._link(name)
            pair = ["add", link, "type", "veth", "peer", "name", "eth0", "netns", str(first)]
            subprocess.run([*self._network("ctl"), "ip", "link", *pair], check=True)
            subprocess.run(
                [*self._network("ctl"), "ip", "link", "set", link, "master", "br0", "up"],
                check=True,
            )
        assert holder.stdout is not None
        output = holder.stdout.readline()
        assert output == "ready\n", (name, (self.folder / f"{name}.log").read_text())


class RayCluster:
    """A real Ray over nodes, entered by a token; the job server listens on n1.

    Ports are Ray's own below 30000; those that ranks choose for themselves are above.
    """

    def __init__(self, nodes: Nodes, cpus: int = 1) -> None:
        self.nodes, self.cpus = nodes, cpus
        self.token = nodes.folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self.address = f"{nodes.address['n1']}:{GCS_PORT}"
        self.jobs_address = f"http://{nodes.address['n1']}:{DASHBOARD_PORT}"
        self.joined: dict[str, subprocess.Popen[str]] = {}

    def env(self, **more: str) -> dict[str, str]:
        """Environment of whoever wants to enter the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        return kept | auth | ray | {"PATH": path, "OMP_NUM_THREADS": "1"} | more

    def start(self, name: str, *flags: str, **env: str) -> None:
        """Start Ray on a node and wait until it has joined; n1 is the head."""
        ports = [
            "--node-manager-port=20001",
            "--object-manager-port=20002",
            "--runtime-env-agent-port=20003",
        ]
        ports += ["--dashboard-agent-grpc-port=20004", "--dashboard-agent-listen-port=20005"]
        ports += [
            "--metrics-export-port=20006",
            "--min-worker-port=20100",
            "--max-worker-port=20999",
        ]
        if name == "n1":
            ports += [
                "--head",
                f"--port={GCS_PORT}",
                "--include-dashboard=true",
                "--ray-client-server-port=20007",
            ]
            ports += ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            ports += [f"--address={self.address}"]
        words = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--disable-usage-stats",
            *ports,
        ]
        words += [f"--node-ip-address={self.nodes.address[name]}", f"--num-cpus={self.cpus}"]
        words += ["--object-store-memory=200000000", *flags]
        log = self.nodes.folder / f"ray_{name}.log"
        with open(log, "w") as file:
            started = self.nodes.popen(
                name,
                *words,
                env=self.env(**env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.joined[name] = started
        wait_until(
            lambda: "Ray runtime started" in log.read_text() or started.poll() is not None,
            RAY_START_S,
        )
        assert started.poll() is None, log.read_text()

    def logs(self, name: str) -> Path:
        """Where a node's Ray writes its logs, as the host sees it."""
        # not session_latest: it is an absolute link, and would lead to the host's own
        sessions = Path(f"/proc/{self.nodes._first[name]}/root/tmp/ray").glob("session_2*")
        return max(sessions, key=lambda folder: folder.name) / "logs"


def only_child(pid: int) -> int:
    """The process that another one has started, as soon as it has."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    wait_until(lambda: bool(path.read_text().split()))
    return int(path.read_text().split()[0])


def kill_and_wait(pid: int) -> None:
    """SIGKILL to process 1 of a namespace, and with it to all others in there."""
    with suppress(ProcessLookupError):
        os.kill(pid, 9)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def wait_until(done: Any, seconds: float = 30.0) -> None:
    """Ask until it is so."""
    deadline = time.monotonic() + scaled_timeout(seconds)
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
