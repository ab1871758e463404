"""The line about a dead worker names the rank that died first, and its log."""

from pathlib import Path

from orchestrator.run.ray.deaths import KEPT, reason_of_death

GONE = """The actor died unexpectedly before finishing this task.
	class_name: RayTrainWorker
	actor_id: 3fb1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR \
Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. \
Some common causes include: (1) killed"""


class Failed(Exception):
    """As Ray Train's WorkerGroupError."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = {int(rank[1:]): failure for rank, failure in failures.items()}


class Gone(Exception):
    """As Ray Train's WorkerHealthCheckFailedError."""

    health_check_failure = OSError()


def log_of(rank: int) -> Path:
    return Path(f"logs/rank_{rank:05d}.log")


def test_a_process_that_is_gone_comes_before_ranks_that_lost_it() -> None:
    error = Failed(
        r0=RuntimeError("Connection closed by peer"),
        r1=Gone(GONE),
        r2=RuntimeError("Connection reset"),
    )
    expected = (
        "rank 1: its process is gone: killed by a signal, out of memory, or crashed; its "
        "log is logs/rank_00001.log"
    )
    assert reason_of_death(error, log_of) == expected


def test_what_a_rank_raised_is_cut_at_a_word() -> None:
    reason = reason_of_death(
        Failed(r3=RuntimeError("a matrix is not\n  invertible " + 99 * "again ")), log_of
    )
    assert reason.startswith("rank 3: a matrix is not invertible again ")
    assert reason.endswith(" again ...; its log is logs/rank_00003.log")
    assert len(reason) < KEPT + 60


def test_a_node_that_died_is_named_without_what_only_ray_reads() -> None:
    text = (
        "The actor died.\n\tclass_name: Worker\n\tip: 10.0.0.1\nThe actor died because its "
        "node has died. Node Id: 77"
    )
    output = reason_of_death(Failed(r0=Gone(text)), log_of)
    assert output.startswith(
        "rank 0: The actor died. The actor died because its node has died. Node Id: 77;"
    )


def test_a_controller_that_died_has_no_rank() -> None:
    assert reason_of_death(OSError("the controller is gone"), log_of) == "the controller is gone"
