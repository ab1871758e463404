"""The systems of the table: the command that a user starts, and where its files are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import task

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += [f"--nproc-per-node={task.RANKS}"]


class System(NamedTuple):
    """A system; paths are relative to the folder of a cell."""

    title: str
    command: Callable[[Path], list[str]]
    in_shell_loop: bool  # run again until it exits with 0; otherwise it restarts ranks itself
    checkpoints: str  # glob of their folders
    weights: str  # of the finished model
    environment: dict[str, str] = {}  # beside cell.SAME_FOR_ALL
    progress: str = r"^step \d|^saved after|^\{'|it/s\]"  # lines that do not speak of a fault


def our_settings(cell: Path) -> str:
    """Write the settings of a run of ours and return their path."""
    settings = {
        "run": {"dir": str(cell / "work"), "name": "run"},
        "model": {"path": str(task.model_folder())},
        "data": {"train": str(task.pairs_file())},
        "dpo": {"loss_type": "ours:loss", "beta": task.BETA},
        "batch": {
            "global_batch_size": task.RANKS * task.PAIRS_PER_RANK,
            "micro_batch_size": task.PAIRS_PER_RANK,
        },
        "optimizer": {"lr": task.LR},
        "training": {"max_steps": task.STEPS, "logging_steps": 1},
        "checkpoint": {"every_steps": task.SAVE_EVERY, "keep": task.KEEP},
        "cluster": {
            "num_workers": task.RANKS,
            "max_failures": task.RESTARTS,
            "collective_timeout_s": task.collective_timeout_s(),
        },
        "callbacks": ["ours:Steps"],
        "precision": "fp32",
        "wandb": {"mode": "disabled"},
    }
    path = cell / "settings.yaml"
    path.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return str(path)


def ours(verb: str, *words: str) -> Callable[[Path], list[str]]:
    """Return the command of a verb of ours."""
    program = [sys.executable, "-m", "orchestrator", verb]
    return lambda cell: [*program, our_settings(cell), *words]


SYSTEMS = {
    "ours-debug": System(
        "ours: `orchestrator debug --nproc 2`, in a shell loop",
        ours("debug", "--nproc", str(task.RANKS)),
        True,
        "work/run/checkpoints/step_*",
        "work/run/model/model.safetensors",
    ),
    "ours-train": System(
        "ours: `orchestrator train`, on a local Ray",
        ours("train"),
        False,
        "work/run/checkpoints/step_*",
        "work/run/model/model.safetensors",
    ),
    "ray-train": System(
        "bare Ray Train, FailureConfig",
        lambda _: [sys.executable, str(HERE / "ray_train.py")],
        False,
        "work/storage/run/checkpoint_*",
        "work/final/model.safetensors",
        {},
        r"PlacementGroupCleaner|Setting up process|Requesting|Attempting|Checkpoint s|Reporting",
    ),
    "trl": System(
        "TRL's DPOTrainer, torchrun in a shell loop",
        lambda _: [*TORCHRUN, str(HERE / "trl_dpo.py")],
        True,
        "work/out/checkpoint-*",
        "work/final/model.safetensors",
    ),
    "deepspeed": System(
        "DeepSpeed ZeRO-1, torchrun --max-restarts",
        lambda _: [
            *TORCHRUN,
            f"--max-restarts={task.RESTARTS}",
            str(HERE / "deepspeed_zero1.py"),
        ],
        False,
        "work/checkpoints/global_step*",
        "work/final/model.safetensors",
        # with its shared store, torchrun 2.13 restarts ranks on gloo only by luck: they connect to
        # the addresses of the attempt before
        {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    ),
}
