"""Answers of nodes become checks with fixes, and this machine's answers are true. Real clusters
that are broken are in tests/faults.
"""

import os
import socket
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.run.checks import disk, preflight, probe
from orchestrator.run.checks.checks import (
    bandwidth_checks,
    clock_checks,
    file_checks,
    folder_checks,
    gpu_checks,
    port_checks,
    silence_checks,
    version_checks,
)
from orchestrator.run.checks.disk import space_checks
from orchestrator.run.checks.preflight import Node, check_here, check_nodes, this_process
from orchestrator.run.checks.probe import NOT_SEEN, Card, Facts, Gpus, Probe
from orchestrator.run.checks.report import Check, refusal, table
from orchestrator.run.ray import node_checks
from orchestrator.settings.errors import UserError
from support.failed_checks import wrong
from support.tiny_settings import tiny_spec, write_settings

GB = 10**9
VERSIONS = {"python": "3.11.2", **dict.fromkeys(probe.PACKAGES, "1.0"), "torch": "2.13.0+cu130"}
FACTS = Facts("/venv/bin/python", VERSIONS, Gpus(), {}, (32768, 60999))


def having(**versions: str) -> Facts:
    return replace(
        FACTS,
        versions=VERSIONS | {name.replace("_", "-"): version for name, version in versions.items()},
    )


# --- facts -> checks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("odd", "cure"),
    [
        (
            {"torch": "2.12.0+cu126"},
            "run /venv/bin/python -m pip install torch==2.13.0+cu130 "
            "--index-url https://download.pytorch.org/whl/cu130 there, and restart its Ray",
        ),
        (
            {"ray": "2.61.0"},
            "run /venv/bin/python -m pip install ray==1.0 there, and restart its Ray",
        ),
        (
            {"deepspeed": "missing"},
            "run /venv/bin/python -m pip install deepspeed==1.0 there, and restart its Ray",
        ),
        ({"python": "3.12.1"}, "start its Ray with Python 3.11.2"),
        ({"dpo_orchestrator": "0.0.9"}, "install the same checkout there"),
    ],
)
def test_the_node_with_another_version_is_named(odd: dict[str, str], cure: str) -> None:
    (name, version), *_ = odd.items()
    facts = {"driver": FACTS, "n1": FACTS, "n2": having(**odd), "n3": FACTS}
    usual = VERSIONS[name.replace("_", "-")]
    values = [Check(name.replace("_", "-"), "n2", version, f"the others have {usual}", cure)]
    assert wrong(version_checks(facts)) == values
    assert wrong(version_checks({"driver": FACTS, "n2": having(**odd), "n1": FACTS})) == values


def test_a_driver_without_gpus_may_have_another_build_of_torch() -> None:
    facts = {"driver": having(torch="2.13.0+cpu"), "n1": FACTS, "n2": FACTS}
    assert wrong(version_checks(facts)) == []
    facts = {"driver": having(torch="2.12.0+cpu"), "n1": FACTS, "n2": FACTS}
    assert [(check.name, check.node) for check in wrong(version_checks(facts))] == [
        ("torch", "driver")
    ]


def test_a_package_missing_on_every_node_is_not_a_difference() -> None:
    facts = {"n1": having(peft="missing"), "n2": having(peft="missing")}
    assert wrong(version_checks(facts)) == []
    facts["n3"] = FACTS
    assert [check.cure for check in wrong(version_checks(facts))] == [
        "run /venv/bin/python -m pip uninstall peft there"
    ]


IDLE, BUSY = Card("H100", 80 * GB, GB), Card("H100", 80 * GB, 40 * GB)


@pytest.mark.parametrize(
    ("gpus", "idle", "says", "cure"),
    [
        (Gpus(2, "", (IDLE, IDLE)), True, "", ""),
        (Gpus(2, "", (IDLE, BUSY)), False, "", ""),  # Ray has given it to somebody
        (
            Gpus(2, "", (IDLE, BUSY)),
            True,
            "another process uses 40 GB of 80 GB on a GPU",
            "end the processes that",
        ),
        (
            Gpus(1, "", (IDLE,)),
            True,
            "there should be 2 (the others are hidden)",
            "or with --num-gpus=1",
        ),
        (
            Gpus(0, "Torch not compiled with CUDA enabled", (IDLE,)),
            True,
            "there should be 2",
            "torch==2.13.0 there",
        ),
        (
            Gpus(0, "Torch not compiled with CUDA enabled"),
            True,
            "there should be 2",
            "nvidia-smi shows no GPU there",
        ),
        (
            Gpus(0, "The NVIDIA driver on your system is too old", (IDLE,)),
            True,
            "too old",
            "update the NVIDIA driver",
        ),
        (
            Gpus(0, "Found no NVIDIA driver"),
            True,
            "there should be 2 (Found no NVIDIA driver)",
            "nvidia-smi shows no GPU there: fix its NVIDIA driver, run on machines with GPUs",
        ),
    ],
)
def test_gpus_that_torch_cannot_use(gpus: Gpus, idle: bool, says: str, cure: str) -> None:
    facts = {"driver": FACTS, "n1": replace(FACTS, gpus=gpus)}
    (check,) = gpu_checks(facts, {"n1": 2}, idle)
    assert (check.name, check.node, check.ok) == ("GPUs", "n1", not says)
    assert says in check.wrong
    assert cure in check.cure


def test_gpus_that_ray_does_not_know_of_are_missed_too() -> None:
    facts = {"n1": replace(FACTS, gpus=Gpus(0, "CUDA_VISIBLE_DEVICES hides them", (IDLE,)))}
    (check,) = gpu_checks(facts, {"n1": 0}, True)
    assert check.wrong == "there should be 1 (CUDA_VISIBLE_DEVICES hides them)"


def test_files_must_be_readable_and_the_same() -> None:
    gone = UserError("data.train", "/d.jsonl", "does not exist", "give a file")
    facts = {
        node: replace(FACTS, files={"data.train": actual})
        for node, actual in {"driver": 7, "n1": 7, "n2": gone, "n3": 9}.items()
    }
    assert [
        (c.name, c.node, c.value, c.wrong)
        for c in wrong(file_checks(facts, {"data.train": "/d.jsonl"}))
    ] == [
        ("data.train", "n2", "/d.jsonl", "does not exist"),
        ("data.train", "n3", "/d.jsonl", "has 9 bytes there, but 7 on the others"),
    ]


def test_a_folder_must_be_shared_and_writable() -> None:
    failed = {
        "driver": {},
        "n1": {},
        "n2": {"run.dir": NOT_SEEN},
        "n3": {"run.dir": "Read-only file system"},
    }
    checks = folder_checks(
        {"run.dir": Path("/runs/x")}, failed, {"driver": {"run.dir": ["n1"]}, "n1": {"run.dir": []}}
    )
    values = {check.node: (check.wrong, check.cure) for check in checks}
    mount = "mount the file system of /runs/x there, or set run.dir to a folder shared by all nodes"
    assert values == {
        "driver": ("files written by n1 are not visible, so it is not shared", mount),
        "n1": ("", ""),
        "n2": ("files written by the driver are not visible, so it is not shared", mount),
        "n3": (
            "cannot be written (Read-only file system)",
            "free some space, give the user who runs Ray write permission, or set run.dir to "
            "another folder",
        ),
    }


@pytest.mark.parametrize(
    ("offsets", "off"),
    [
        ({"driver": (0, 0), "n1": (0.1, 0.01), "n2": (-2.9, 0.01)}, {}),
        ({"driver": (0, 0), "n1": (0.1, 0.01), "n2": (60, 0.01)}, {"n2": "+60.0 s"}),
        ({"driver": (0, 0), "n1": (-60, 0.01)}, {"n1": "-60.0 s"}),
        # the others are right
        ({"driver": (0, 0), "n1": (60, 0.01), "n2": (61, 0.01)}, {"driver": "-60.0 s"}),
        ({"driver": (0, 0), "n1": (0, 0), "n2": (5, 4)}, {}),  # nobody knows: the answer came late
    ],
)
def test_clocks_must_agree(offsets: dict[str, tuple[float, float]], off: dict[str, str]) -> None:
    assert {check.node: check.value for check in wrong(clock_checks(offsets))} == off


def test_ports_that_are_blocked_name_both_ends_and_the_range() -> None:
    checks = port_checks(
        {"n1": {}, "n2": {"n1": "timed out", "n3": "timed out"}},
        {"n1": (1, 2), "n2": (32768, 60999)},
    )
    assert [(check.node, check.ok) for check in checks] == [("n1", True), ("n2", False)]
    assert checks[1].wrong == "cannot be reached from n1, n3 (timed out)"
    assert checks[1].cure.startswith("allow TCP to its ports 32768-60999 ")


def test_remaining_answers_of_nodes_become_checks() -> None:
    assert [check.value for check in bandwidth_checks({"n1": 2e9, "n2": 1.5e9})] == [
        "1.5 GB/s, 16.8 MB over 2 nodes"
    ] * 2
    silent, apart = silence_checks(
        [("facts", "n1", "no answer within 25 s"), ("all_reduce", "n2", "Connection refused")]
    )
    assert str(refusal([silent])).startswith(
        "node on n1 = 'no answer within 25 s': could not be checked (facts); check"
    )
    assert "set cluster.network_interface" in apart.cure


def test_the_table_prints_each_fix_beside_its_failure() -> None:
    nodes = ["driver", *(f"n{number}" for number in range(1, 6))]
    checks = [Check("torch", node, "2.13.0") for node in nodes]
    checks += [
        Check("clock", "n1", "within 3 s"),
        Check("clock", "n2", "+60.0 s", "is ahead", "set it"),
    ]
    assert table(checks).splitlines() == [
        "ok   torch  driver, n1, n2 and 3 more  2.13.0",
        "ok   clock  n1                         within 3 s",
        "RED  clock  n2                         +60.0 s     is ahead; set it",
    ]
    checks += [
        Check("torch", "n6", "2.12.0", "is old", "mend it"),
        Check("torch", "n7", "2.12.0", "is old", "mend it"),
    ]
    assert str(refusal(checks)).splitlines() == [
        "clock on n2 = '+60.0 s': is ahead; set it",
        "torch on n6, n7 = '2.12.0': is old; mend it",
    ]
    assert refusal([Check("torch", "n1", "2.13.0")]) is None
    assert (
        str(refusal([Check("run.dir", "", "/x", "is full", "free it")]))
        == "run.dir = '/x': is full; free it"
    )


# --- this machine ---------------------------------------------------------------------------------


def test_checks_of_this_machine_pass_and_leave_no_files(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, data={"cache_dir": str(tmp_path / "a" / "b")})
    before = sorted(tmp_path.iterdir())
    checks = check_here(spec) + space_checks(spec)
    assert wrong(checks) == []
    assert [check.value for check in checks if check.name == "GPUs"] == ["0 for torch"]
    names = {
        "python",
        "torch",
        "data.train",
        "data.eval",
        "run.dir",
        "data.cache_dir",
        "space in run.dir",
    }
    assert names <= {check.name for check in checks}
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "a").mkdir()
    check_here(spec)
    assert list((tmp_path / "a").iterdir()) == []  # what was there stays


def test_failed_checks_of_this_machine_are_reported(tmp_path: Path) -> None:
    hub_or_here = {"path": "/nowhere/model", "init": None}
    spec = tiny_spec(
        tmp_path, run={"dir": "/proc/runs"}, data={"train": "/nowhere.jsonl"}, model=hub_or_here
    )
    values = {check.name: check for check in wrong(check_here(spec))}
    assert values.keys() == {"run.dir", "data.train", "model.path"}
    assert values["run.dir"].wrong.startswith("cannot be written (")
    assert str(refusal([values["data.train"]])).startswith(
        "data.train = '/nowhere.jsonl': does not exist; use a JSONL"
    )


def test_a_file_system_that_hangs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (probe, disk):
        monkeypatch.setattr(module, "READ_S", 0.2)
    ended = threading.Event()
    # a stand-in for a file system that hangs, which cannot be had here
    monkeypatch.setattr(probe, "check_source", lambda *_: ended.wait(60))
    spec = tiny_spec(tmp_path)
    with pytest.raises(
        UserError,
        match=r"data\.train = .*: cannot be read \(no answer within 0 s\); fix its file system",
    ):
        disk.check_answers(spec)
    assert {check.name for check in wrong(check_here(spec))} == {"data.train", "data.eval"}
    ended.set()


def test_a_full_file_system_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    spec = tiny_spec(tmp_path, run={"dir": "/proc/runs"})  # which has no room at all
    with pytest.raises(
        UserError,
        match=r"run\.dir = '/proc/runs/tiny': is on a file system that is full; free some",
    ):
        disk.check_answers(spec)


@pytest.mark.parametrize(
    ("text", "visible", "cards"),
    [
        ("0, GPU-a, H100, 81559, 4\n1, GPU-b, H100, 81559, 900\n", None, [4, 900]),
        ("0, GPU-a, H100, 81559, 4\n1, GPU-b, H100, 81559, 900\n", "1", [900]),
        ("0, GPU-a, H100, 81559, 4\n1, GPU-b, H100, 81559, 900\n", "GPU-a", [4]),
        ("0, GPU-a, H100, 81559, 4\n", "", []),
        ("0, GPU-a, GB10, [N/A], [N/A]\n", None, [0]),
    ],
)
def test_nvidia_smi_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    visible: str | None,
    cards: list[int],
) -> None:
    (tmp_path / "said").write_text(text)
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.used // 2**20 for card in probe.cards()] == cards


# --- nodes ----------------------------------------------------------------------------------------


def test_a_node_that_does_not_answer_is_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "START_S", 3.0)
    # waits are longer on a busy machine
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    answers = this_process("n1")._replace(address="127.0.0.1")
    hangs = Node("n2", "127.0.0.2", 0, lambda *_: Future())
    checks = check_nodes(this_process("driver"), [answers, hangs], tiny_spec(tmp_path))
    assert [(check.name, check.node, check.value) for check in wrong(checks)] == [
        ("node", "n2", "no answer within 3 s")
    ]
    assert {check.value for check in checks if check.name == "all-reduce"} == {
        "not measured until the other checks pass"
    }
    assert [check.node for check in checks if check.name == "ports"] == ["n1"]


def test_nodes_reach_each_other_or_say_why_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = Probe().listen("127.0.0.1")
        actual = Probe().connect({"n1": ("127.0.0.1", port), "n2": taken.getsockname()})
    assert actual == {"n2": "Connection refused"}


def test_an_address_without_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            UserError,
            match=r"RAY_ADDRESS = .*: no Ray answers there \(Connection refused\); start the",
        ):
            node_checks.check_all_nodes(None)


# --- the verb -------------------------------------------------------------------------------------


def test_doctor_prints_all_and_ends_with_2_where_something_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # cli.main adds to it
    settings = str(write_settings(tmp_path))
    assert cli.main(["doctor", settings]) == cli.DONE
    assert all(line.startswith("ok ") for line in capsys.readouterr().out.splitlines())
    assert cli.main(["doctor", settings, "data.train=/nowhere.jsonl"]) == cli.WRONG
    output = capsys.readouterr().out.splitlines()
    (red,) = [line for line in output if line.startswith("RED")]
    assert red.split()[:4] == ["RED", "data.train", "here", "/nowhere.jsonl"]
    assert "does not exist; use a JSONL, JSON, CSV, Parquet or Arrow file" in red
    assert sum(line.startswith("ok ") for line in output) > 10
    assert cli.main(["doctor"]) == cli.DONE
    assert "data.train" not in capsys.readouterr().out
