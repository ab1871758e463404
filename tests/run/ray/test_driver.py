"""The driver's decisions without starting Ray; whole runs on Ray are in tests/quickstart and
tests/faults.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from orchestrator.run.ray import capacity, driver, elastic
from orchestrator.run.ray.cluster import check_ray_address
from orchestrator.run.ray.objects import pickled_objects, unpickled_objects
from orchestrator.settings.errors import RunDied, UserError
from orchestrator.training.result import last_result
from orchestrator.training.rundir import RunDir
from orchestrator.training.user_objects import UserObjects
from support.timeouts import scaled_timeout
from support.tiny_parts import ALONE
from support.tiny_settings import tiny_spec


@pytest.mark.parametrize(
    ("placement", "fits"), [("PACK", 5), ("SPREAD", 5), ("STRICT_PACK", 3), ("STRICT_SPREAD", 2)]
)
def test_placement_decides_how_many_workers_fit(placement: str, fits: int) -> None:
    assert capacity.placeable([3, 0, 2], placement) == fits
    assert capacity.placeable([], placement) == 0


class Counting(TrainerCallback):
    count: Any = 0


def test_user_objects_of_a_script_are_pickled_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")  # so that no token is made
    spec, lr = tiny_spec(tmp_path), 0.25
    assert pickled_objects(spec, UserObjects()) == {}
    sent = pickled_objects(
        spec, UserObjects(optimizers=(lambda params: (params, lr), None), callbacks=[Counting()])
    )
    assert set(sent) == {"optimizers", "callbacks"}
    main, other = (unpickled_objects(sent, world) for world in (ALONE, replace(ALONE, rank=1)))
    assert [type(each) for each in main.callbacks or ()] == [Counting]
    assert other.callbacks is None  # which may open a file when it is read
    assert other.optimizers is not None
    make, schedule = other.optimizers
    assert make is not None
    assert (make("params"), schedule) == (("params", 0.25), None)
    lock = threading.Lock()
    with pytest.raises(
        UserError,
        match=r"optimizers = .*: cannot be sent to the workers \(.*lock.*\); store only names",
    ):
        pickled_objects(spec, UserObjects(optimizers=(None, lambda optimizer: lock)))
    held = Counting()
    held.count = lock
    with pytest.raises(
        UserError, match=r"callbacks = .*Counting object.*: cannot be sent to the workers \(.*lock"
    ):
        pickled_objects(spec, UserObjects(callbacks=[held]))
    with pytest.raises(UserError, match="ref_model = 'as sent': cannot be read on a worker"):
        unpickled_objects({"ref_model": b"cnowhere\nmine\n."}, ALONE)


def test_a_run_that_lost_a_node_waits_for_another_and_then_says_how_to_go_on(
    tmp_path: Path, run_dir: RunDir
) -> None:
    spec = tiny_spec(tmp_path, cluster={"replacement_wait_s": 77})
    waits: list[float] = []

    def fit(wait_s: float) -> Exception:
        waits.append(wait_s)
        if len(waits) == 2:
            raise UserError("cluster.num_workers", 2, "is too many", "set it to 1")
        return OSError("a node is gone")

    with pytest.raises(
        RunDied,
        match=r"cluster\.num_workers = 2.* the same command continues from the start",
    ):
        driver.run_attempts(spec, run_dir, fit)
    assert waits == [capacity.CLUSTER_WAIT_S, 77]


def test_a_cluster_that_was_never_large_enough_is_refused(tmp_path: Path, run_dir: RunDir) -> None:
    def fit(_: float) -> Exception:
        raise UserError("cluster.num_workers", 2, "is too many", "set it to 1")

    with pytest.raises(UserError):
        driver.run_attempts(tiny_spec(tmp_path), run_dir, fit)


@pytest.mark.parametrize("saved", [True, False])
def test_a_stop_request_ends_a_waiting_run(tmp_path: Path, run_dir: RunDir, saved: bool) -> None:
    attempts: list[float] = []

    def fit(wait_s: float) -> Exception:
        attempts.append(wait_s)
        if len(attempts) == 1:
            return OSError("a node is gone")
        run_dir.stop.touch()
        capacity.check_no_stop(run_dir)  # as the loops do that wait for nodes and places
        raise AssertionError

    folder = run_dir.checkpoints / "step_00000007"
    if saved:
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    ended = driver.run_attempts(tiny_spec(tmp_path), run_dir, fit)
    assert (ended.status, ended.step) == ("stopped", 7 if saved else 0)
    assert ended.checkpoint == (str(folder) if saved else "")
    assert last_result(run_dir) == ended


def test_the_address_of_a_job_server_is_not_that_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    with pytest.raises(
        UserError,
        match=r"is the address of a job server, .* orchestrator submit --to ray --address",
    ):
        check_ray_address()


# --- elastic runs ---------------------------------------------------------------------------------


def elastic_spec(folder: Path, *ends: int, placement: str = "PACK") -> Any:
    return tiny_spec(
        folder,
        cluster={"num_workers": list(ends) if len(ends) > 1 else ends[0], "placement": placement},
    )


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say for how many more workers Ray has room: each time that it is asked, the last for good."""

    def say(*places: int) -> None:
        answers = iter(places)

        @contextmanager
        def granting(spec: Any, count: int) -> Iterator[Callable[[], int]]:
            yield lambda: min(count, next(answers, places[-1]))

        monkeypatch.setattr(elastic, "requested_places", granting)

    monkeypatch.setattr(capacity, "CLUSTER_WAIT_S", 0.0)
    monkeypatch.setattr(elastic, "GROWTH_WAIT_S", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    return say


@pytest.mark.parametrize(
    ("ends", "placement", "cluster", "workers"),
    [
        ((2,), "PACK", (4, 2), 2),
        ((2,), "STRICT_PACK", (4, 0), 2),  # Ray waits
        ((1, 4), "PACK", (8, 8), 4),
        ((1, 4), "PACK", (3, 3), 3),
        ((1, 4), "SPREAD", (8, 2), 2),  # others hold the rest
        ((1, 4), "STRICT_PACK", (3, 9), 3),
    ],
)
def test_an_attempt_takes_the_workers_that_there_is_room_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: Callable[..., None],
    ends: tuple[int, ...],
    placement: str,
    cluster: tuple[int, int],
    workers: int,
) -> None:
    held, places = cluster  # places that the nodes have, and that are free
    room(places)
    monkeypatch.setattr(capacity, "wait_for_capacity", lambda *_: held)
    assert elastic.count_workers(elastic_spec(tmp_path, *ends, placement=placement), 0.0) == workers


@pytest.mark.parametrize(("ends", "workers"), [((2,), 2), ((2, 4), 2)])
def test_the_fewest_are_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    ends: tuple[int, ...],
    workers: int,
) -> None:
    room(0, 0, 1, 1, 2)
    monkeypatch.setattr(capacity, "wait_for_capacity", lambda *_: 8)
    assert elastic.count_workers(elastic_spec(tmp_path, *ends), 0.0) == workers
    assert "workers: 0 of 2 are placed; waiting for the others\n" in capsys.readouterr().out


def test_a_node_that_is_found_to_be_gone_is_not_waited_for_as_one_that_others_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: Callable[..., None]
) -> None:
    room(1)
    values: list[float] = []

    def room_of_nodes(spec: Any, wait_s: float, run_dir: Any = None) -> int:
        values.append(wait_s)
        if len(values) == 3:
            raise UserError("cluster.num_workers", 2, "is too many", "set it to 1")
        return 2

    monkeypatch.setattr(capacity, "wait_for_capacity", room_of_nodes)
    with pytest.raises(UserError):
        elastic.count_workers(elastic_spec(tmp_path, 2), 7.0)
    assert values == [7.0] * 3


def test_a_stop_is_heard_while_others_hold_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: RunDir, room: Callable[..., None]
) -> None:
    room(0)
    run_dir.stop.touch()
    monkeypatch.setattr(capacity, "wait_for_capacity", lambda *_: 8)
    with pytest.raises(capacity.StoppedWaiting):
        elastic.count_workers(elastic_spec(tmp_path, 2), 0.0, run_dir)


def test_a_stop_is_heard_while_a_node_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: RunDir
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    monkeypatch.setattr(capacity, "live_nodes", list)
    run_dir.stop.touch()
    spec = tiny_spec(tmp_path, cluster={"resources": {"CPU": 1}})
    with pytest.raises(capacity.StoppedWaiting):
        capacity.wait_for_capacity(spec, 600.0, run_dir)


@pytest.mark.parametrize(
    ("has", "each", "fits"), [(1, 0.2, 5), (1, 0.1, 10), (0.6, 0.2, 3), (1, 0.3, 3), (0, 1, 0)]
)
def test_shares_of_a_gpu_are_counted_without_rounding_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: float, each: float, fits: int
) -> None:
    node = {
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerHostname": "n1",
        "Resources": {"GPU": has},
    }
    monkeypatch.setattr(capacity, "live_nodes", lambda: [node])
    spec = tiny_spec(tmp_path, cluster={"num_workers": max(1, fits), "resources": {"GPU": each}})
    if fits:
        assert capacity.wait_for_capacity(spec, 0.0) == fits
    else:
        with pytest.raises(UserError, match="can hold 0"):
            capacity.wait_for_capacity(spec, 0.0)


def test_on_this_machine_the_fewest_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "usable_cores", lambda: 2)
    capacity.check_local_size(elastic_spec(tmp_path, 1, 4))
    with pytest.raises(
        UserError, match=r"num_workers = \[3, 4\]: workers need 1 CPU each, .* 2 CPUs; set .*=2"
    ):
        capacity.check_local_size(elastic_spec(tmp_path, 3, 4))
    # and nobody else has any of it
    monkeypatch.setattr(capacity, "wait_for_capacity", lambda *_: 2)
    assert elastic.count_workers(elastic_spec(tmp_path, 1, 4), 0.0) == 2


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    directory = RunDir(tmp_path / "run")
    directory.logs.mkdir(parents=True)
    return directory


@pytest.mark.parametrize(
    ("placement", "places", "grows"),
    [("PACK", 1, True), ("PACK", 0, False), ("STRICT_SPREAD", 1, False)],
)
def test_a_run_saves_before_it_grows(
    tmp_path: Path,
    run_dir: RunDir,
    room: Callable[..., None],
    placement: str,
    places: int,
    grows: bool,
) -> None:
    room(places)

    def trains() -> None:
        run_dir.heartbeat(0).touch()
        deadline = time.monotonic() + (scaled_timeout(30) if grows else 3 * capacity.POLL_S)
        while not run_dir.stop.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    training = threading.Thread(target=trains)
    training.start()
    elastic.save_when_more_fit(
        elastic_spec(tmp_path, 1, 2, placement=placement), run_dir, 1, training
    )
    training.join()
    assert elastic.is_growth_request(run_dir) is grows
    run_dir.stop.touch()  # somebody wants it to stop
    assert not elastic.is_growth_request(run_dir)


def test_growing_does_not_replace_a_users_stop_request(run_dir: RunDir) -> None:
    run_dir.stop.write_text("orchestrator stop")
    elastic.request_growth(run_dir)
    assert not elastic.is_growth_request(run_dir)
    assert run_dir.stop.read_text() == "orchestrator stop"


@pytest.mark.parametrize("requested", ["growth", "growth, then a user", "a user"])
def test_only_a_user_ends_a_run_by_a_stop(tmp_path: Path, run_dir: RunDir, requested: str) -> None:
    attempts: list[str] = []

    def fit(_: float) -> None:
        assert not run_dir.stop.exists()
        attempts.append("finished" if attempts else "stopped")
        if attempts == ["stopped"]:
            if "growth" in requested:
                elastic.request_growth(run_dir)
            if "user" in requested:
                run_dir.stop.touch()
        run_dir.write_result(
            {"status": attempts[-1], "reason": "", "step": 1, "checkpoint": "", "model": None}
        )

    ended = driver.run_attempts(elastic_spec(tmp_path, 1, 2), run_dir, fit)
    assert [ended.status, *attempts] == (
        ["finished", "stopped", "finished"] if requested == "growth" else ["stopped"] * 2
    )
