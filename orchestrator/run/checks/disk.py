"""Check the file systems of a run: they answer, are not full, and have room for what it writes."""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.engines.optim import optimizer_factory
from orchestrator.engines.precision import dtype_held
from orchestrator.models.adapters import add_adapter
from orchestrator.models.layers import freeze_lowest
from orchestrator.models.loading import config_at
from orchestrator.run.checks.parallel import one_line, side_by_side
from orchestrator.run.checks.probe import IMPORT_S, READ_S, bytes_at
from orchestrator.run.checks.report import Check, size_text
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import PATH_KEYS, looks_local, paths_in
from orchestrator.settings.run import RunSpec

FULL = 2**20  # free bytes below which a run cannot start


def local_sources(spec: RunSpec) -> dict[str, str]:
    """Return {setting: path} of local files and folders that the run reads."""
    return {key: path for key, path in paths_in(spec, PATH_KEYS).items() if looks_local(path)}


def written_folders(spec: RunSpec) -> dict[str, Path]:
    """Return {setting: folder} of folders that every node writes."""
    shared = {"run.dir": spec.run_dir}
    if Path(spec.run.dir) not in spec.cache_dir.parents:
        shared["data.cache_dir"] = spec.cache_dir
    return shared


def check_answers(spec: RunSpec) -> None:
    """Check that the file systems of a run respond and are not full.

    Raises:
        UserError: for the first setting whose file system does not.
    """
    folders, sources = written_folders(spec), local_sources(spec)
    paths = {**{key: str(folder) for key, folder in folders.items()}, **sources}
    free: dict[str, Callable[[], Any]] = {
        key: partial(_free_bytes, folder) for key, folder in folders.items()
    }
    read: dict[str, Callable[[], Any]] = {
        key: partial(bytes_at, key, path) for key, path in sources.items()
    }
    for key, result in side_by_side({**free, **read}, READ_S).items():
        if isinstance(result, TimeoutError):
            cure = f"fix its file system, or set {key} to a path on another one"
            raise UserError(key, paths[key], f"cannot be read ({one_line(result)})", cure)
        if key in free and isinstance(result, int) and result < FULL:
            cure = f"free some space there, or set {key} to another file system"
            raise UserError(key, paths[key], "is on a file system that is full", cure)


class DiskBudget(NamedTuple):
    """Bytes that a run writes, a lower bound if the optimizer's state is unknown."""

    checkpoint: int
    checkpoints: int  # maximum number at once
    model: int

    @property
    def total(self) -> int:
        """Return the total bytes."""
        return self.checkpoint * self.checkpoints + self.model


def disk_needed(spec: RunSpec, own_optimizer: bool = False) -> DiskBudget:
    """Return the bytes that a run writes.

    They follow from the model's config and one optimizer step on a small matrix. own_optimizer: a
    user's function creates the optimizer.
    """
    model, lora = _model_without_weights(spec), spec.model.lora
    exported = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    saved = [p for name, p in model.named_parameters() if lora is None or ".lora_" in name]
    weight = dtype_held(spec.precision).itemsize
    state = 0.0 if own_optimizer else _state_bytes(spec)
    checkpoint = sum(p.numel() * (weight + state * p.requires_grad) for p in saved)
    return DiskBudget(int(checkpoint), _checkpoints_at_once(spec), 4 * exported)


def _model_without_weights(spec: RunSpec) -> PreTrainedModel:
    """Build the model of a run on the meta device, with its adapter or frozen layers."""
    init, lora = spec.model.init, spec.model.lora
    if init is not None:
        config = AutoConfig.for_model(
            init.model_type, **{"vocab_size": init.vocab_size, **init.config}
        )
    else:
        config = config_at("model.path", str(spec.model.path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora is not None and lora.adapter_path is None:
            add_adapter(model, lora, 0, torch.float32, True)
        elif spec.frozen_layers is not None:
            freeze_lowest(model, spec.frozen_layers, spec.model.tied_head == "untie")
    return model


def _checkpoints_at_once(spec: RunSpec) -> int:
    """Return how many checkpoints there are at most, while one is being written."""
    every, steps = spec.checkpoint.every_steps, spec.training.max_steps
    if spec.checkpoint.every is not None:
        every = 1  # unknown
    keeps_best = spec.evaluation.metric_for_best is not None
    at_once = spec.checkpoint.keep + 1 + keeps_best
    if every is None and not keeps_best:
        at_once = 1
    if steps is None:
        return at_once
    return min(at_once, steps if keeps_best or every is None else -(-steps // every))


def _state_bytes(spec: RunSpec) -> float:
    """Return the bytes of optimizer state per trainable element; 0 if unknown."""
    if not spec.optimizer.is_elementwise:
        return 0.0
    if spec.optimizer.compiles_kernels:
        return 8.0  # two fp32 moments; building the optimizer would compile it
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype_held(spec.precision)))
    p.grad = torch.zeros_like(p)
    optimizer = optimizer_factory(spec.optimizer)([{"params": [p], "weight_decay": 0.0}])
    optimizer.step()
    state = [
        value
        for value in optimizer.state[p].values()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    return sum(value.nbytes for value in state) / p.numel()


def space_checks(spec: RunSpec, own_optimizer: bool = False) -> list[Check]:
    """Check for free space for the rest of the run; own_optimizer: as in `disk_needed`."""
    folders = written_folders(spec)
    functions: dict[str, Callable[[], Any]] = {
        key: partial(_free_bytes, folder) for key, folder in folders.items()
    }
    functions["needed"] = partial(disk_needed, spec, own_optimizer)
    kept = [spec.run_dir / "checkpoints", spec.run_dir / "model"]
    functions["held"] = partial(_bytes_below, kept)
    # a result may also be an exception, which other checks report
    results = side_by_side(functions, IMPORT_S)
    needed: DiskBudget | None = (
        results["needed"] if isinstance(results["needed"], DiskBudget) else None
    )
    more = FULL
    if needed and isinstance(results["held"], int):
        more = max(FULL, needed.total - results["held"])
    checks: list[Check] = []
    for key, folder in folders.items():
        if not isinstance(free := results[key], int):
            continue
        if key == "run.dir":
            checks.append(_run_dir_check(spec, free, more, needed))
        else:
            checks.append(_space_check(key, folder, free, FULL))
    return checks


def _run_dir_check(spec: RunSpec, free: int, more: int, needed: DiskBudget | None) -> Check:
    """Check for space in the run directory, and name what fills it if that is known."""
    if needed is None:
        return _space_check("run.dir", spec.run_dir, free, more)
    checkpoints = f"{needed.checkpoints} of {size_text(needed.checkpoint)} at once"
    purpose = f" for checkpoints ({checkpoints}, and the model of {size_text(needed.model)})"
    lower = f", lower checkpoint.keep ({spec.checkpoint.keep})"
    return _space_check("run.dir", spec.run_dir, free, more, purpose, lower)


def _space_check(
    key: str, folder: Path, free: int, needed: int, purpose: str = "", lower: str = ""
) -> Check:
    """Check for space in a folder. purpose: of the bytes; lower: another way to need less."""
    name = f"space in {key}"
    if free >= needed:
        return Check(name, "", f"{size_text(free)} free, {size_text(needed)} needed")
    wrong = f"the run needs {size_text(needed)} more in {folder}{purpose}"
    cure = f"free some space there{lower}, or set {key} to another file system"
    return Check(name, "", f"{size_text(free)} free", wrong, cure)


def _free_bytes(folder: Path) -> int:
    """Return the free bytes at a folder, existing or not."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _bytes_below(folders: Iterable[Path]) -> int:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files)
