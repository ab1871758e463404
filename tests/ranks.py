"""A function on real gloo ranks, which are forks of a process with everything imported."""

import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from forked import FORKS, free_port, start_forking

from orchestrator.world import World

TIMEOUT_S = 240.0


def on_gloo(size: int, run: Callable[..., Any], *args: Any) -> list[Any]:
    """`run(world, *args)` on every rank; what each returned, by rank. `run` travels by its name, so a test's own is of
    a module that can be imported; what it returns is pickled.

    Raises:
        AssertionError: a rank raised or died; with its traceback.
    """
    start_forking()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "DS_ACCELERATOR": "cpu"}
    pipes = [FORKS.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        FORKS.Process(target=_rank, args=(pipes[rank][1], env | {"RANK": str(rank)}, run, args)) for rank in range(size)
    ]
    for rank, (_, given) in zip(ranks, pipes, strict=True):
        rank.start()
        given.close()
    results: list[Any] = [None] * size
    waiting, deadline = set(range(size)), time.monotonic() + TIMEOUT_S
    try:
        while waiting:
            assert time.monotonic() < deadline, f"ranks {sorted(waiting)} have not come to an end"
            for number in list(waiting):
                if not pipes[number][0].poll(0.01):
                    continue
                try:
                    failed, results[number] = pickle.loads(pipes[number][0].recv_bytes())
                except EOFError:
                    failed, results[number] = True, "died"
                assert not failed, f"rank {number} of {size}: {results[number]}"
                waiting.remove(number)
    finally:
        for rank in ranks:
            if waiting:
                rank.kill()
            rank.join()
    return results


def _rank(pipe: Any, env: dict[str, str], run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()  # as in forked.py
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        made = False, run(World.join(60, use_gpu=False), *args)
    except BaseException:
        made = True, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(made))  # by send, tensors would go through memory that ends with this process
    pipe.close()
    os._exit(0)
