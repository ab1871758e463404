"""slurm/train.sbatch on a real Slurm of two nodes, with stubs of ray and of the driver: what
becomes of the job, and that nothing of it stays behind.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cluster_nodes import wait_until
from support.repository import ROOT
from support.slurm_cluster import Slurm
from support.slurm_jobs import Job, give, slurm_commands, submit_stubbed, with_stubs

pytestmark = pytest.mark.slurm
Submit = Callable[..., Job]
BOTH_NODES = ["--nodes=2", "--exclusive"]


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Submit:
    """Submit train.sbatch to both nodes; keyword arguments are settings, those in capitals of the
    environment.
    """

    def submitted(**options: object) -> Job:
        env = {name: str(value) for name, value in options.items() if name.isupper()}
        settings = {"run_dir": str(tmp_path / "run")} | {
            n: v for n, v in options.items() if not n.isupper()
        }
        return submit_stubbed(
            slurm, tmp_path, "train.sbatch", *BOTH_NODES, settings=settings, **env
        )

    return submitted


def test_the_sbatch_command_of_the_docs_starts_the_driver(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "my.yaml").write_text(json.dumps({"run_dir": str(tmp_path / "run")}))
    [command] = slurm_commands(1)
    job = give(slurm, command, tmp_path, tmp_path / "run", **with_stubs())
    driver = job.started()
    assert driver["words"] == ["my.yaml", "run.name=by-flags"]
    assert driver["cwd"] == str(tmp_path)  # not the repository
    assert driver["SLURMD_NODENAME"] == "n1"
    assert driver["RAY_ADDRESS"].startswith(f"{slurm.nodes.address['n1']}:")
    job.go()
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0")
    assert job.log_file == tmp_path / f"dpo-{job.number}.log"
    logs = {path.name: path.read_text() for path in (job.run_dir / "logs").iterdir()}
    # no token stays
    assert sorted(logs) == [f"ray-{job.number}-0-{node}.log" for node in ("n1", "n2")]
    head, worker = (logs[name] for name in sorted(logs))
    assert "with 8 GPUs: start --num-cpus=64 --head" in head
    assert f"with 8 GPUs: start --num-cpus=64 --address={driver['RAY_ADDRESS']}" in worker


@pytest.mark.parametrize("code", [1, 2, 3])
def test_the_drivers_exit_code_is_the_jobs(submit: Submit, code: int) -> None:
    job = submit()
    job.started()
    job.go(code)
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_wrong_settings_are_refused_before_any_node_is_used(slurm: Slurm, tmp_path: Path) -> None:
    job = submit_stubbed(slurm, tmp_path, "train.sbatch", settings={})
    assert job.ended()["ExitCode"] == "2:0"
    assert job.log() == "error: run.dir = (not set): the stub refuses\n"


def test_usr1_saves_and_requeues(submit: Submit) -> None:
    job = submit()
    assert job.started()["SLURM_RESTART_COUNT"] is None
    job.signal("USR1")
    again = job.started(2)
    assert (again["SLURM_RESTART_COUNT"], again["resumes"]) == ("1", True)
    job.go()
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "stub: stopped by SIGUSR1 and saved" in job.log()
    assert "requeued, to continue from checkpoint: step_000000001" in job.log()


def test_usr1_before_the_driver_listens(submit: Submit) -> None:
    job = submit(deaf=True)
    job.started()
    job.signal("USR1")
    job.requeued()
    job.cancel()
    assert job.ended()["JobState"] == "CANCELLED"
    assert "requeued, to continue from checkpoint: none" in job.log()


def test_usr1_before_anything_has_started(submit: Submit, tmp_path: Path) -> None:
    token = tmp_path / "token"  # of another cluster
    token.touch()
    job = submit(hold=True, RAY_AUTH_TOKEN_PATH=token)
    wait_until((tmp_path / "planning").exists, 60)
    job.signal("USR1")
    (tmp_path / "settings.json").write_text(json.dumps({"run_dir": str(job.run_dir)}))
    job.requeued()
    job.cancel()
    assert job.ended()["JobState"] == "CANCELLED"
    assert (job.drivers(), list(job.run_dir.glob("logs/ray-*"))) == ([], [])
    assert token.exists()


def test_usr1_while_nodes_come_up(submit: Submit) -> None:
    job = submit(STUB_RAY_NEVER="n2")
    wait_until(lambda: bool(list(job.run_dir.glob("logs/ray-*-n2.log"))), 60)
    job.signal("USR1")
    job.requeued()
    job.cancel()
    assert job.ended()["JobState"] == "CANCELLED"
    assert job.drivers() == []


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(submit: Submit) -> None:
    job = submit()
    job.started()
    before = ["step_000000001"] * 2  # two starts that ended where this one will
    (job.run_dir / f"logs/requeues-{job.number}").write_text("\n".join(before) + "\n")
    job.signal("USR1")
    ended = job.ended()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0")
    assert "error: --time = 10:00: three starts in a row wrote no new checkpoint" in job.log()


def test_preemption_requeues(submit: Submit) -> None:
    job = submit()
    job.started()
    slurm = job.slurm
    urgent = slurm.sbatch(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=srun true"
    )
    assert slurm.ended(urgent)["JobState"] == "COMPLETED"
    again = job.started(2)
    assert again["resumes"] is True
    job.go()
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_scancel_saves_and_is_final(submit: Submit) -> None:
    job = submit()
    job.started()
    job.cancel()
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "stub: stopped by SIGTERM and saved" in job.log()


def test_scancel_after_usr1_is_final(submit: Submit) -> None:
    job = submit()
    job.started()
    job.signal("USR1")
    job.cancel()
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_a_node_that_never_comes_up(submit: Submit) -> None:
    job = submit(STUB_RAY_NEVER="n2", NODES_TIMEOUT_S="2")
    assert job.ended()["ExitCode"] == "1:0"
    log = job.run_dir / f"logs/ray-{job.number}-0-n2.log"
    errors = [line for line in job.log().splitlines() if line.startswith("error")]
    assert errors == [
        "error: node = n2: no Ray there after 2 s, but training needs every node of the job; "
        f"look into {log}; then submit again with --exclude=n2, or with a longer NODES_TIMEOUT_S"
    ]
    assert job.drivers() == []


def test_a_node_without_a_working_ray(submit: Submit) -> None:
    job = submit(STUB_RAY_ENDS="n2")
    assert job.ended()["ExitCode"] == "1:0"
    assert "error: node = n2: Ray has ended there" in job.log()
    assert (job.run_dir / f"logs/ray-{job.number}-0-n2.log").read_text().count("the stub ends") == 3


def test_a_ray_that_dies_young_is_started_again(submit: Submit) -> None:
    job = submit(STUB_RAY_TWICE="n2")
    job.started()
    job.go()
    assert job.ended()["JobState"] == "COMPLETED"


def test_a_driver_that_is_killed_leaves_a_run_to_resume(submit: Submit) -> None:
    job = submit()
    driver = job.started()
    saved = job.run_dir / "checkpoints/step_000000001/manifest.json"
    saved.parent.mkdir(parents=True)
    saved.write_text("{}")
    job.slurm.nodes.run("n1", "kill", "-9", str(driver["pid"]))
    assert job.ended()["ExitCode"] == "137:0"
    again = submit()
    assert again.started(2)["resumes"] is True
    again.go()
    assert again.ended()["JobState"] == "COMPLETED"


def test_a_node_that_loses_its_power(submit: Submit) -> None:
    job = submit()
    job.started()
    job.slurm.power_cut("n2")
    wait_until(lambda: job.state() == "PENDING", 60)
    job.slurm.power_on("n2")
    job.started(2)
    job.go()
    ended = job.ended()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")


def test_two_jobs_share_nodes(slurm: Slurm, tmp_path: Path) -> None:
    jobs: list[Job] = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        jobs.append(
            submit_stubbed(slurm, tmp_path / name, "train.sbatch", "--nodes=2", "--cpus-per-task=4")
        )
    drivers = [job.started() for job in jobs]  # the stubs hold their ports, all at once
    assert drivers[0]["RAY_ADDRESS"] != drivers[1]["RAY_ADDRESS"]
    for job in jobs:
        job.go()
    for job in jobs:  # before any of them looks for processes that are left
        slurm.ended(job.number)
    assert [job.ended()["JobState"] for job in jobs] == ["COMPLETED"] * 2


def test_a_job_whose_ports_another_one_holds(slurm: Slurm, tmp_path: Path) -> None:
    """Their numbers may differ by a multiple of 40; here one holds, without Ray, those of the next
    number.
    """
    hold = (
        "import os, signal, socket; port = 10000 + (int(os.environ['SLURM_JOB_ID']) + 1) % 40 "
        "* 500 + 1; "
    )
    hold += (
        f"held = socket.create_server(('', port)); open('{tmp_path}/port', "
        "'w').write(str(port)); signal.pause()"
    )
    holder = slurm.sbatch("--nodelist=n1", "--output=/dev/null", f'--wrap=exec python3 -c "{hold}"')
    wait_until(lambda: (tmp_path / "port").exists() and (tmp_path / "port").read_text() != "", 60)
    job = submit_stubbed(slurm, tmp_path, "train.sbatch", "--nodes=2", "--cpus-per-task=4")
    assert job.number == holder + 1
    port = int(job.started()["RAY_ADDRESS"].rpartition(":")[2])
    job.go()
    slurm.ended(job.number)
    slurm.run("scancel", str(holder))
    slurm.ended(holder)
    assert job.ended()["JobState"] == "COMPLETED"
    taken = int((tmp_path / "port").read_text()) - 1
    assert port == 10000 + (taken - 10000 + 500) % 20000


def test_no_orchestrator_to_be_found(submit: Submit) -> None:
    job = submit(PATH="/usr/bin:/bin", VIRTUAL_ENV="/nowhere")
    assert job.ended()["ExitCode"] == "1:0"
    assert "error: VIRTUAL_ENV = /nowhere: node n1 finds no orchestrator" in job.log()
