"""A cluster on which a run would go wrong is refused in a minute, in a line that says what to
change; on a real Ray of two nodes, of which one is broken, and repaired, for each test.
"""

import json
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from support.cluster_nodes import Nodes, RayCluster, why_not
from support.timeouts import scaled_timeout
from support.tiny_settings import write_settings

REFUSED_WITHIN_S = 60  # what is promised, of an idle machine
IMPORTED_WITHIN_S = 10  # of it, where a test has that done beforehand
N1, N2 = r"10\.77\.0\.11 \(n1\)", r"10\.77\.0\.12 \(n2\)"
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
# Python on the second node, while a file `clock` says by how much its clock is wrong. Namespaces
# share the machine's clock, so this one is faked; not in Ray's own processes, whose clock may not
# jump.
SITECUSTOMIZE = f"""
import os, sys
from pathlib import Path
clock = Path(__file__).with_name("clock")
if clock.exists() and "FAKETIME" not in os.environ:
    os.environ.update(LD_PRELOAD="{FAKETIME[0] if FAKETIME else ""}", FAKETIME=clock.read_text())
    os.execv(sys.executable, sys.orig_argv)
"""
# The command line with all imported, as a fork for each line: a log and the words.
COMMANDS = """
import json, os, sys
from orchestrator import cli
from orchestrator.run.ray import driver
for line in sys.stdin:
    log, *words = json.loads(line)
    if (child := os.fork()) == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        code = cli.main(words)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


class Cluster:
    """Two nodes, of which the first has the head and the driver, and the second says that it has a
    GPU.
    """

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes, self.ray = folder, nodes, RayCluster(nodes)
        self.data, self.runs, self.packages = (
            folder / name for name in ("data", "runs", "packages")
        )
        for path in (self.data, self.runs, self.packages):
            path.mkdir()
        cluster = {"num_workers": 2, "resources": {"CPU": 1}, "placement": "SPREAD"}
        self.settings = write_settings(self.data, cluster=cluster, run={"dir": str(self.runs)})
        (self.packages / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.ray.start("n1", "--include-dashboard=false")  # nobody submits a job
        self.ray.start(
            "n2", "--num-gpus=1", PYTHONPATH=str(self.packages), CUDA_VISIBLE_DEVICES="99"
        )

        self.env = self.ray.env(RAY_ADDRESS=self.ray.address, CUDA_VISIBLE_DEVICES="")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.forking = nodes.popen(
            "n1", sys.executable, "-c", COMMANDS, cwd=folder, env=self.env, **pipes
        )

    def doctor(self) -> subprocess.CompletedProcess[str]:
        """The verb with the settings, on the first node."""
        command = [sys.executable, "-m", "orchestrator.cli", "doctor", self.settings]
        return self.nodes.run(
            "n1", *command, cwd=self.folder, timeout=REFUSED_WITHIN_S, env=self.env
        )

    def train(self, *words: str) -> tuple[int, str]:
        """The verb with the settings, on the first node; exit code, and what it said."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        assert self.forking.stdin is not None
        assert self.forking.stdout is not None
        self.forking.stdin.write(json.dumps([str(log), "train", str(self.settings), *words]) + "\n")
        self.forking.stdin.flush()
        ended, _, _ = select.select(
            [self.forking.stdout], [], [], scaled_timeout(REFUSED_WITHIN_S - IMPORTED_WITHIN_S)
        )
        assert ended, f"still running: {log.read_text()}"
        return int(self.forking.stdout.readline()), log.read_text()

    def on(self, node: str, *command: str | Path) -> None:
        """Run a command on a node."""
        done = self.nodes.run(node, *command)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("cluster")
    with Nodes(folder / "nodes") as nodes:
        yield Cluster(folder, nodes)


def test_on_a_whole_cluster_everything_is_green(cluster: Cluster) -> None:
    done = cluster.doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split(maxsplit=2)[1]: line for line in done.stdout.splitlines()}
    assert all(line.startswith("ok ") for line in lines.values())
    everywhere = "driver (n1), 10.77.0.11 (n1), 10.77.0.12 (n2)"
    assert all(
        everywhere in lines[name]
        for name in ("python", "torch", "ray", "data.train", "run.dir", "clock")
    )
    assert "B/s, 16.8 MB over 2 nodes" in lines["all-reduce"]
    assert list(cluster.runs.iterdir()) == []  # nothing is left of it


# --- broken ---------------------------------------------------------------------------------------

Broken = Callable[[Cluster], AbstractContextManager[None]]


@contextmanager
def other_version(cluster: Cluster) -> Iterator[None]:
    """Fake: the name and version of a torch that is not there, where the second node looks
    first.
    """
    installed = cluster.packages / "torch-9.9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    try:
        yield
    finally:
        shutil.rmtree(installed)


@contextmanager
def hidden(cluster: Cluster, node: str, folder: Path, size: str = "64m") -> Iterator[None]:
    """A node has a file system of its own in the place of a folder."""
    cluster.on(node, "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        cluster.on(node, "umount", "--lazy", folder)


@contextmanager
def full_disk(cluster: Cluster) -> Iterator[None]:
    with hidden(cluster, "n1", cluster.runs, size="4m"):
        cluster.on("n1", "fallocate", "--length", str(2**22 - 2**17), cluster.runs / "others")
        yield


@contextmanager
def blocked_ports(cluster: Cluster) -> Iterator[None]:
    """Packets to ports that nobody has named are dropped on the second node; Ray's own ports are
    below those.
    """
    if shutil.which("nft") is None:
        pytest.skip("nft is missing: apt-get install nftables")
    rule = "tcp dport 32768-60999 ct state new drop"
    cluster.on(
        "n2",
        "nft",
        f"add table ip broken; add chain ip broken in {{ type filter hook input priority 0; }}; "
        f"add rule ip broken in {rule}",
    )
    try:
        yield
    finally:
        cluster.on("n2", "nft", "delete table ip broken")


@contextmanager
def wrong_clock(cluster: Cluster) -> Iterator[None]:
    if not FAKETIME:
        pytest.skip("libfaketime is missing: apt-get install faketime")
    clock = cluster.packages / "clock"
    clock.write_text("+3600")
    try:
        yield
    finally:
        clock.unlink()


@contextmanager
def as_it_is(cluster: Cluster) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("broken", "words", "says"),
    [
        pytest.param(
            other_version,
            [],
            rf"torch on {N2} = '9\.9\.9': the others have (\S+); run \S+python\S* -m pip install "
            rf"torch==\1",
            id="another version on a node",
        ),
        pytest.param(
            lambda cluster: hidden(cluster, "n2", cluster.runs),
            [],
            rf"run\.dir on {N2} = '\S+/runs/tiny': files written by the driver are not visible, "
            rf"so it is not shared; "
            r"mount the file system of \S+/runs/tiny there, or set run\.dir to a folder shared "
            r"by all nodes",
            id="run directory not shared",
        ),
        pytest.param(
            blocked_ports,
            [],
            rf"ports on {N2} = '32768-60999': cannot be reached from {N1} \(timed out\); "
            r"allow TCP to its ports 32768-60999",
            id="a blocked port",
        ),
        pytest.param(
            as_it_is,
            ["cluster.num_workers=1", "cluster.resources={GPU: 1}"],
            rf"GPUs on {N2} = '0 for torch': there should be 1 \(.+\); (run \S+ -m pip|nvidia-smi "
            rf"shows no GPU)",
            id="no GPU where one is asked",
        ),
        pytest.param(
            full_disk,
            [],
            r"run\.dir = '\S+/runs/tiny': is on a file system that is full; free some space "
            r"there, or set run\.dir",
            id="a full disk",
        ),
        pytest.param(
            wrong_clock,
            [],
            rf"clock on {N2} = '\+3600\.\d s': is ahead of the other clocks; synchronise it with "
            rf"chrony or ntpd",
            id="a skewed clock",
        ),
        pytest.param(
            as_it_is,
            ["cluster.num_workers=3"],
            rf"cluster\.num_workers = 3: workers need 1 CPU each, .* can hold 2: 1 CPU on {N1}, "
            rf"{N2}; "
            r"set cluster\.num_workers=2, lower cluster\.resources, or join a larger cluster",
            id="a missing node",
        ),
        pytest.param(
            lambda cluster: hidden(cluster, "n2", cluster.data),
            [],
            rf"data\.train on {N2} = '\S+/train\.jsonl': does not exist; use a JSONL, JSON, CSV, "
            rf"Parquet",
            id="unreadable data",
        ),
    ],
)
def test_a_broken_cluster_is_refused(
    cluster: Cluster, broken: Broken, words: list[str], says: str
) -> None:
    with broken(cluster):
        code, output = cluster.train(*words)
    assert code == 2, output
    assert any(re.search(says, line) for line in output.splitlines()), output
    assert not (cluster.runs / "tiny" / "result.json").exists()
