"""Run one step of a small run on the CPU, so that `plan` raises the run's errors."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.order import Integers
from orchestrator.data.pairs import Pairs
from orchestrator.run.local.trial import NothingToSave, scratch_run
from orchestrator.settings.engine import EngineSpec
from orchestrator.settings.errors import TrainingError, UserError, type_and_message
from orchestrator.settings.load import looks_local
from orchestrator.settings.optim import SchedulerSpec
from orchestrator.settings.precision import PRECISION_TRAITS
from orchestrator.settings.run import RunSpec
from orchestrator.training.assemble import assembled
from orchestrator.training.context import RunContext
from orchestrator.training.prepare import PreparedRun
from orchestrator.world import World

MOST_BYTES = 128 * 2**20  # maximum size of weight files, or of weights in fp32
STEP_PAIRS, EVALUATED_PAIRS = 4, 16  # numbers of the shortest pairs to use
WEIGHT_SUFFIXES = (".safetensors", ".bin")


def is_small(spec: RunSpec, config: Any) -> bool:
    """Return whether the models of a run are small enough to build while a user waits."""
    folders = [path for path in (spec.model.path, spec.reference.path) if path is not None]
    if not all(looks_local(path) for path in folders):
        return False
    sizes = [_bytes_of_weights(path) for path in folders]
    return sum(sizes) + (_bytes_of_config(config) if spec.model.init else 0) <= MOST_BYTES


def rehearse(spec: RunSpec, prepared: PreparedRun) -> list[str]:
    """Build all parts of a run, evaluate and run one step, on a few of the shortest pairs.

    It always uses a single process on the CPU: the errors found here do not depend on the engine.
    Nothing is written, and no callback is called. Returns a line if this fails because of this
    machine.

    Raises:
        UserError: the run would raise it, too.
    """
    few = replace(
        prepared,
        train=_shortest(prepared.train, STEP_PAIRS),
        eval={name: _shortest(pairs, EVALUATED_PAIRS) for name, pairs in prepared.eval.items()},
    )
    world = World(0, 1, 0, torch.device("cpu"))
    try:
        with redirect_stdout(io.StringIO()):
            _try_a_step(spec, few, world)
    except (UserError, TrainingError):
        raise
    # the machine of the run may have a kernel or library that is missing here
    except Exception as error:
        return [f"a trial step on this machine's CPU failed ({type_and_message(error)})"]
    finally:
        world.leave()
    return []


def _try_a_step(spec: RunSpec, few: PreparedRun, world: World) -> None:
    with scratch_run(spec) as (bare, run_dir):
        bare = _on_cpu(bare.model_copy(update={"evaluation": spec.evaluation}), len(few.train))
        with (
            assembled(RunContext(bare, world, NothingToSave(), run_dir), few) as trainer,
            closing(trainer.steps()) as steps,
        ):
            trainer.evaluate()
            trainer.forward_backward(next(steps))
            trainer.engine.grads_finite()
            trainer.engine.optimizer_step(apply=False)


def _on_cpu(spec: RunSpec, pairs: int) -> RunSpec:
    """Return the settings without those that need a GPU, an engine's library or a length."""
    updates: dict[str, Any] = {
        "engine": EngineSpec(shard_optimizer=spec.engine.deals_parameters),  # pyright: ignore
        "scheduler": SchedulerSpec(),
        "batch": spec.batch.model_copy(update={"global_batch_size": pairs}),
        "reference": spec.reference.model_copy(update={"sharded": False}),
        "precision": PRECISION_TRAITS[spec.precision].weights,
    }
    if spec.model.attention in ("varlen", "cpu"):
        updates["model"] = spec.model.model_copy(update={"attention": "auto"})
    if spec.optimizer.compiles_kernels:
        adamw = {"name": "torch.optim.AdamW", "kwargs": {}}
        updates["optimizer"] = spec.optimizer.model_copy(update=adamw)
    return spec.model_copy(update=updates)


def _shortest(pairs: Pairs, count: int) -> Pairs:
    order: Integers = np.argsort(pairs.lengths.sum(axis=1), kind="stable")
    return pairs.only(order[:count])


def _bytes_of_weights(folder: str) -> int:
    files = (Path(folder) / name for name in os.listdir(folder) if name.endswith(WEIGHT_SUFFIXES))
    return sum(file.stat().st_size for file in files if file.is_file())


def _bytes_of_config(config: Any) -> int:
    """Return the fp32 bytes of a model of a config; 0 if it cannot be built without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    # the rehearsal reports the error
    except (ValueError, RuntimeError, TypeError, ArithmeticError):
        return 0
    return 4 * sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def scratch_cache(spec: RunSpec) -> Iterator[RunSpec]:
    """Yield the settings with a temporary cache, so that a plan leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-plan-") as folder:
        yield spec.model_copy(update={"data": spec.data.model_copy(update={"cache_dir": folder})})
