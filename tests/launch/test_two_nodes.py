"""Runs on a real Ray over two nodes, entered by a token: by Ray's own `ray job submit`, and by
ours, whose exit code is the run's. Last of all, a W&B key that every process could see is looked
for in all that was written.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator.run.local.replay import replay
from orchestrator.training.rundir import RunDir
from support.cluster_nodes import Nodes, RayCluster, wait_until, why_not
from support.debug_runs import finish_debug
from support.repository import ROOT, doc_commands
from support.run_files import losses
from support.timeouts import scaled_timeout, slowdown
from support.tiny_settings import write_settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

CANARY = "canary-89abcdef0123456789abcdef0123456789"
# How soon a head takes a node for dead; it would be a minute. RAY_health_check_* are its own names.
IMPATIENT = {
    "RAY_health_check_period_ms": str(round(1000 * slowdown())),
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_timeout_ms": str(round(2000 * slowdown())),
}
USERS_CODE = """
import json, os, time, torch
from pathlib import Path
from transformers import TrainerCallback

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and not Path("{folder}/died").exists():
            Path("{folder}/died").touch()
            os._exit(7)

class Waits(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 30:
            Path("{folder}/waits").touch()
            while not Path(args.output_dir, "STOP").exists():
                time.sleep(0.05)

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        time.sleep(0.1)

def collate(rows, context):
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    names += ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    where = {{name: os.environ[name] for name in names}} | {{"host": os.uname().nodename}}
    Path("{folder}", f"rank{{context.rank}}.json").write_text(json.dumps(where))
    sides = ("chosen_ids", "rejected_ids")
    width = max(len(r["prompt_ids"] + r[side]) for r in rows for side in sides)
    made = {{"input_ids": [], "attention_mask": [], "completion_mask": []}}
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            prompt, answer = row["prompt_ids"], row[side]
            rest = width - len(prompt) - len(answer)
            made["input_ids"].append(prompt + answer + [0] * rest)
            made["attention_mask"].append([1] * (width - rest) + [0] * rest)
            made["completion_mask"].append([0] * len(prompt) + [1] * len(answer) + [0] * rest)
    return {{name: torch.tensor(value) for name, value in made.items()}}
"""


class Place(NamedTuple):
    """A folder that every node sees, and a Ray: n1, the head, with two CPUs, n2 with one; n3 is a
    node without Ray.
    """

    folder: Path
    nodes: Nodes
    ray: RayCluster

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of whoever submits; the W&B key is in it too."""
        return self.ray.env(
            RAY_API_SERVER_ADDRESS=self.ray.jobs_address, WANDB_API_KEY=CANARY, **more
        )

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """`orchestrator submit --to ray run.yaml WORDS...` from a machine that is no node."""
        return self.nodes.popen(
            "ctl",
            *["orchestrator", "submit", "--to", "ray", "run.yaml", *words],
            cwd=self.folder,
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("two_nodes")
    write_settings(
        folder,
        run={"name": "run"},
        training={"max_steps": 40},
        checkpoint={"every_steps": 2},
        wandb={"mode": "offline"},
        data={"collator": "users_code:collate"},
        cluster={"num_workers": 3, "placement": "PACK", "resources": {"CPU": 1}, "max_failures": 0},
    )
    (folder / "users_code.py").write_text(USERS_CODE.format(folder=folder))
    with Nodes(folder / "nodes", count=3) as nodes:
        ray = RayCluster(nodes)
        ray.start("n1", "--num-cpus=2", WANDB_API_KEY=CANARY, HF_HUB_OFFLINE="1", **IMPATIENT)
        ray.start("n2", WANDB_API_KEY=CANARY, HF_HUB_OFFLINE="1")
        yield Place(folder, nodes, ray)


def output_of(process: subprocess.Popen[str], seconds: float = 240) -> str:
    return process.communicate(timeout=scaled_timeout(seconds))[0]


def test_a_run_crashes_is_submitted_again_loses_a_node_and_is_stopped(place: Place) -> None:
    """The crash and the stop have exit codes of their own; between them the run goes on by itself,
    when another node has come.
    """
    crashed = place.submit("callbacks=[users_code:Dies]")
    log = output_of(crashed)
    assert crashed.returncode == 1, log
    assert re.search(
        r"error: deaths without a new checkpoint: 1 .* raise cluster\.max_failures", log
    ), log
    assert re.search(
        r"ranks: (0-1 on 10\.77\.0\.11 \(n1\); 2 on 10\.77\.0\.12 \(n2\)"
        r"|0 on 10\.77\.0\.12 \(n2\); 1-2 on 10\.77\.0\.11 \(n1\))\n",
        log,
    ), log
    ranks = [json.loads((place.folder / f"rank{rank}.json").read_text()) for rank in range(3)]
    by_host = {host: [each for each in ranks if each["host"] == host] for host in ("n1", "n2")}
    assert [each["LOCAL_RANK"] for each in by_host["n1"]] == ["0", "1"]
    assert [each["LOCAL_RANK"] for each in by_host["n2"]] == ["0"]
    assert len({each["NODE_RANK"] for each in ranks}) == 2
    assert {(each["GLOO_SOCKET_IFNAME"], each["NCCL_SOCKET_IFNAME"]) for each in ranks} == {
        ("eth0", "=eth0")
    }

    again = place.submit(
        *["callbacks=[users_code:Slow,users_code:Waits]", "cluster.max_failures=1"],
        *["cluster.num_workers=2", "cluster.placement=STRICT_SPREAD"],
    )
    run_dir, waits = place.folder / "runs/run", place.folder / "waits"
    wait_until(
        lambda: (
            (run_dir / "checkpoints/step_00000004/manifest.json").exists()
            or again.poll() is not None
        ),
        200,
    )
    place.nodes.down("n2")
    waits.unlink(missing_ok=True)
    place.ray.start("n3", WANDB_API_KEY=CANARY, HF_HUB_OFFLINE="1")
    wait_until(lambda: waits.exists() or again.poll() is not None, 200)
    done = place.nodes.run(
        "ctl", "orchestrator", "stop", run_dir, cwd=place.folder, env=place.env()
    )
    assert re.match(r"signalled process \d+ on n1: it saves", done.stdout), done
    log = output_of(again)
    assert again.returncode == 3, log
    assert "resumed after step 2" in log
    assert "resuming from step" in log
    assert "10.77.0.13 (n3)" in log.rpartition("resuming")[2]
    assert "stopped after step" in log
    # what was logged of steps that were taken twice was taken back
    assert sorted(losses(run_dir)) == list(range(1, max(losses(run_dir)) + 1))


def test_a_submitted_run_with_wrong_settings_exits_with_2(place: Place) -> None:
    wrong = place.submit("callbacks=[users_code:Nobody]", "run.name=wrong")
    log = output_of(wrong)
    assert wrong.returncode == 2, log
    assert "error: callbacks = 'users_code:Nobody'" in log


def test_a_wrong_token_or_address_of_the_job_server_is_refused(
    place: Place, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    words = ["orchestrator", "submit", "--to", "ray", "run.yaml"]
    env = place.env(RAY_AUTH_TOKEN_PATH=str(token))
    refused = place.nodes.run("ctl", *words, cwd=place.folder, env=env)
    assert refused.returncode == 2
    assert re.search(
        r"error: --address = .*: no job server accepts us \(.*\); use --address", refused.stderr
    )
    nobody = place.nodes.run(
        "ctl", *words, "--address=http://10.77.0.13:8265", cwd=place.folder, env=place.env()
    )
    assert nobody.returncode == 2
    assert "no job server accepts us" in nobody.stderr


def test_the_wandb_key_is_in_no_file_or_job(place: Place) -> None:
    listed = (
        "import json, sys; from ray.job_submission import JobSubmissionClient as Client;"
        "print([str(job) for job in Client().list_jobs()])"
    )
    jobs = place.nodes.run("ctl", sys.executable, "-c", listed, env=place.env())
    assert jobs.stdout.count("submitted.yaml") >= 3, jobs
    assert CANARY not in jobs.stdout
    searched = 0
    for folder in (place.folder, place.ray.logs("n1"), place.ray.logs("n3")):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                searched += 1
                assert CANARY.encode() not in path.read_bytes(), path
    assert searched > 100
    assert list(place.folder.rglob("*.wandb"))


@pytest.mark.slow
def test_the_jobs_of_the_docs_run_over_both_nodes(place: Place) -> None:
    """As they stand there, but for the address and for the folder that all nodes see: ours, which
    the second command finds finished, and Ray's own. Their losses are those of a debugger, and of a
    replay.
    """
    commands = doc_commands("ray.md", "Submitting a run")
    assert [command.split()[0] for command in commands] == ["orchestrator", "bash", "ray"]
    for command in commands:
        value = command.replace("http://HEAD:8265", place.ray.jobs_address).replace(
            "/shared", f"{place.folder}/shared"
        )
        done = place.nodes.run("ctl", "bash", "-c", value, cwd=ROOT, env=place.env())
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished after step 42 (every step was taken)" in done.stdout
        if not command.startswith("bash"):
            assert re.search(
                r"ranks: 0 on 10\.77\.0\.1\d \(n\d\); 1 on 10\.77\.0\.1\d \(n\d\)\n", done.stdout
            )

    settings = Path(shutil.copy(ROOT / "configs/quickstart.yaml", place.folder))
    words = [
        "wandb.mode=disabled",
        "training.epochs=1",
        "training.logging_steps=1",
        f"run.dir={place.folder}/debug",
    ]
    finish_debug(settings, *words, cwd=ROOT)
    expected = losses(place.folder / "debug/quickstart")
    for name in ("ours", "rays"):
        assert losses(place.folder / "shared/runs" / name) == pytest.approx(expected, rel=1e-5)

    replayed = replay(RunDir(place.folder / "shared/runs/ours"), 7)  # of two nodes, in this process
    assert replayed.loss == pytest.approx(losses(place.folder / "shared/runs/ours")[7], abs=1e-6)
    assert len(replayed.pairs) == 16


@pytest.mark.slow
def test_an_elastic_run_goes_on_at_once_with_what_is_left(place: Place) -> None:
    running = place.submit(
        *[
            "run.name=elastic",
            "data.collator=null",
            "callbacks=[users_code:Slow]",
            "training.max_steps=40",
        ],
        *["engine.kind=fsdp", "cluster.num_workers=[1,3]", "cluster.max_failures=1"],
    )
    run_dir = place.folder / "runs/elastic"
    wait_until(lambda: (run_dir / "checkpoints/step_00000004/manifest.json").exists(), 120)
    place.nodes.down("n3" if "n3" in place.ray.joined else "n2")
    log = output_of(running)
    assert running.returncode == 0, log
    assert "workers: 3 (cluster.num_workers = [1, 3])" in log
    assert "workers: 2 (cluster.num_workers = [1, 3])" in log.rpartition("resuming")[2]
    assert sorted(losses(run_dir)) == list(range(1, 41))
