"""A function on real gloo ranks, which are forks of a process with everything imported."""

import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from orchestrator.world import World
from support.forkserver import FORKS, free_port, start_forking
from support.timeouts import scaled_timeout

TIMEOUT_S = 240.0


class Ranks:
    """Ranks that stay from one call to the next; where one has failed, the next call starts
    others.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._running: list[tuple[Any, Any]] = []  # process and pipe of each

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def call(self, run: Callable[..., Any], *args: Any, seconds: float = TIMEOUT_S) -> list[Any]:
        """`run(world, *args)` on every rank; what each returned, by rank. `run` travels by its
        name, so a test's own is of a module that can be imported; what it returns is pickled.

        Raises:
            AssertionError: a rank raised, with its traceback, or died, or has not returned after so
                many seconds.
        """
        if not self._running:
            self._start()
        results: list[Any] = [None] * self.size
        waiting, deadline = set(range(self.size)), time.monotonic() + scaled_timeout(seconds)
        try:
            for _, pipe in self._running:
                pipe.send_bytes(pickle.dumps((run, args)))
            while waiting:
                assert time.monotonic() < deadline, (
                    f"ranks {sorted(waiting)} have not come to an end"
                )
                for number in list(waiting):
                    pipe = self._running[number][1]
                    if not pipe.poll(0.01):
                        continue
                    try:
                        failed, results[number] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        failed, results[number] = True, "died"
                    assert not failed, f"rank {number} of {self.size}: {results[number]}"
                    waiting.remove(number)
        except BaseException:
            for process, _ in self._running:
                process.kill()
            self._end()
            raise
        return results

    def _start(self) -> None:
        start_forking()
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        env |= {
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "DS_ACCELERATOR": "cpu",
        }
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_rank, args=(theirs, env | {"RANK": str(rank)}))
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def _end(self) -> None:
        for _, pipe in self._running:
            pipe.close()  # where a rank waits for another call it ends
        for process, _ in self._running:
            process.join()
        self._running = []


def on_gloo(size: int, run: Callable[..., Any], *args: Any) -> list[Any]:
    """`Ranks.call`, once."""
    with Ranks(size) as ranks:
        return ranks.call(run, *args)


def _rank(pipe: Any, env: dict[str, str]) -> None:
    gc.freeze()  # as in debug_runs.py
    os.environ.update(env)
    torch.set_num_threads(1)
    world: World | None = None
    while True:
        try:
            run, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            world = world or World.join(scaled_timeout(60), use_gpu=False)
            actual = False, run(world, *args)
        except BaseException:
            actual = True, traceback.format_exc()
        # by send, tensors would go through memory that ends with this process
        pipe.send_bytes(pickle.dumps(actual))
