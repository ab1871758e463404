"""The line about a run that died names what ended it first, not the ranks that lost another one."""

from pathlib import Path

import pytest
import torch

from orchestrator.settings.errors import MachineError
from orchestrator.training import deaths
from orchestrator.training.deaths import PlaceFile, ending, first_death, remove_places
from orchestrator.training.rundir import RunDir
from orchestrator.user_code import call_user_code

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3042")


@pytest.fixture
def ranks(run_dir: RunDir) -> list[PlaceFile]:
    """Two ranks in the second micro-batch of step 12, with pairs 3 and 8 on rank 1."""
    files = [PlaceFile(run_dir, rank) for rank in range(2)]
    for rank, ids in ((1, [3, 8]), (0, [1, 2])):
        files[rank].move(11, "forward", torch.tensor(ids))
        files[rank].move(11, "backward")
    return files


def line(run_dir: RunDir, gone: dict[int, str | None]) -> str:
    death = first_death(run_dir, gone)
    assert death is not None
    return death.line


def test_a_rank_of_a_new_run_that_waits_for_its_directory_is_named(tmp_path: Path) -> None:
    new = RunDir(tmp_path / "new")
    file = PlaceFile(new, 1)
    new.logs.mkdir(parents=True)
    file.move(11, "forward", torch.tensor([3, 8]))
    assert line(new, {1: "SIGKILL"}).startswith("rank 1 on ")


@pytest.mark.parametrize("known", [{1: "SIGKILL"}, {1: None}, {}])
def test_a_killed_rank_leads_before_the_rank_that_lost_it(
    run_dir: RunDir, ranks: list[PlaceFile], known: dict[int, str | None]
) -> None:
    ranks[0].fail(LOST)
    death = first_death(run_dir, known)
    assert death is not None
    assert (death.rank, death.step) == (1, 12)
    assert death.line.startswith("rank 1 on ")
    assert ", step 12, backward, pairs 3, 8: killed by SIGKILL, not for lack" in death.line


def test_the_kernel_that_killed_for_lack_of_memory_is_named(
    run_dir: RunDir, ranks: list[PlaceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deaths.oom_kills() or 0
    monkeypatch.setattr(deaths, "oom_kills", lambda: before + 1)
    assert "killed by SIGKILL by the kernel, as its node ran out of memory; lower" in line(
        run_dir, {1: "SIGKILL"}
    )


def test_the_first_exception_leads_with_the_code_that_raised_it(
    run_dir: RunDir, ranks: list[PlaceFile]
) -> None:
    def loss() -> None:
        raise ZeroDivisionError("no pairs")

    with pytest.raises(ZeroDivisionError) as raised:
        loss()
    ranks[1].fail(raised.value)
    ranks[0].fail(KeyError("later"))
    assert ": raised ZeroDivisionError: no pairs in loss (test_deaths.py line " in line(run_dir, {})


def test_lack_of_memory_in_user_code_is_an_advice(run_dir: RunDir, ranks: list[PlaceFile]) -> None:
    with pytest.raises(MachineError) as raised:
        call_user_code("dpo.loss_type", "my:loss", "for 2 pairs", raise_no_memory)
    ranks[1].fail(raised.value)
    text = line(run_dir, {})
    assert "raised MemoryError in raise_no_memory (test_deaths.py line " in text
    assert "lower batch.micro_batch_size" in text


def raise_no_memory() -> None:
    raise MemoryError


def test_lack_of_memory_is_an_advice(run_dir: RunDir, ranks: list[PlaceFile]) -> None:
    ranks[1].fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "Tried to allocate 2 GiB; lower batch.micro_batch_size" in line(run_dir, {})


def test_a_crash_is_named_with_the_code_that_ran(run_dir: RunDir, ranks: list[PlaceFile]) -> None:
    crash = 'Fatal Python error: Segmentation fault\n\n  File "/home/me/mine.py", line 7 in loss\n'
    (run_dir.logs / "crash_00001.txt").write_text(crash)
    ranks[0].fail(LOST)
    assert line(run_dir, {1: None}).endswith(": killed by SIGSEGV in loss (mine.py line 7)")


def test_damaged_files_and_those_of_an_earlier_attempt_do_not_count(
    run_dir: RunDir, ranks: list[PlaceFile]
) -> None:
    assert first_death(run_dir, {}) is None  # nobody died
    (run_dir.logs / "death_00000.json").write_text("{")
    assert line(run_dir, {1: ending(-9)}).startswith("rank 1 ")
    assert "ended by exit code 7" in line(run_dir, {1: ending(7)})
    remove_places(run_dir)
    assert first_death(run_dir, {1: "SIGKILL"}) is None
