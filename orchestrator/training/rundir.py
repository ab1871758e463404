"""The run directory: its paths, its lock and the file that requests a stop."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec, save_spec
from orchestrator.settings.near import nearest
from orchestrator.settings.run import RunSpec, changed_on_resume
from orchestrator.settings.wrong_file import run_around
from orchestrator.training import ownership


class RunDir:
    """The paths below run.dir/run.name; the constructor neither reads nor writes anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.pairs = path / "pairs.parquet"  # a folder
        # and the model's config.json: an export needs both besides weights
        self.tokenizer = path / "tokenizer"
        self.model = path / "model"
        self.wandb = path / "wandb"
        self.logs = path / "logs"
        self.hang = self.logs / "hang.txt"  # the line of the hang that ended the last attempt
        self.tensorboard = self.logs / "tensorboard"
        self.mlflow = path / "mlflow"
        self.stop = path / "STOP"  # creating this file requests the run to save and stop
        self.result = path / "result.json"
        self.lock = path / ".owner"

    def heartbeat(self, rank: int) -> Path:
        """Return the heartbeat file of a rank."""
        return self.logs / f"heartbeat_{rank:05d}.json"

    def stacks(self, rank: int) -> Path:
        """Return the file of a rank's stacks at the last hang."""
        return self.logs / f"stacks_{rank:05d}.txt"

    @classmethod
    def existing(cls, path: str) -> "RunDir":
        """Return the directory of a run that has started.

        Raises:
            UserError: the path is not the directory of a run.
        """
        run_dir = cls(Path(path))
        if not run_dir.config.is_file():
            raise _not_a_run(Path(path))
        return run_dir

    def check(self, spec: RunSpec) -> None:
        """Check that a resumed run has the settings of its last attempt (config.yaml), except those
        that may change. `Checkpointer` checks models, tokenizer and pairs on the ranks.

        Raises:
            UserError: the directory belongs to a run with other settings.
        """
        if not (self.config.is_file() and any(self.checkpoints.glob("step_*/manifest.json"))):
            return  # nothing was trained yet, so all settings may change
        changes = changed_on_resume(load_spec(self.config), spec)
        if changes:
            keys = ", ".join(f"{key} (was {old!r}, now {new!r})" for key, old, new in changes)
            raise UserError(
                "run.name",
                spec.run.name,
                f"is a started run with other settings: {keys}",
                "restore them to resume it, or choose another run.name",
            )

    def begin(self, spec: RunSpec) -> None:
        """Create the directory, write the settings over those of the last attempt, and delete its
        result.
        """
        for folder in (self.checkpoints, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        save_spec(spec, self.config)
        self.result.unlink(missing_ok=True)

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the directory, as two drivers of one run would overwrite each other.

        It is free again when this process ends, however it does.

        Raises:
            UserError: another process owns it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.touch()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            cure = "set run.dir to another folder"
            raise UserError(
                "run.dir", str(self.path), f"cannot be created ({reason})", cure
            ) from None
        with ownership.owned(self.lock, self.path.name, is_new=not self.config.exists()):
            # a request to an earlier attempt; later ones are for this attempt
            self.stop.unlink(missing_ok=True)
            yield

    def owner(self) -> str | None:
        """Return the process that owns the directory, on any machine; None if none does."""
        return ownership.owner_of(self.lock)

    def metric_lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without those that a full disk or a kill has
        damaged.
        """
        lines: list[dict[str, Any]] = []
        if self.metrics.is_file():
            for line in self.metrics.read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result of the run, for the process that started it."""
        write_atomically(self.result, json.dumps(result))


def _not_a_run(path: Path) -> UserError:
    """Return the error of a path that is not a run directory, with the directory that was probably
    meant.
    """
    rule, fix = (
        "holds no config.yaml, so it is not the directory of a run",
        "use the folder run.dir/run.name",
    )
    runs = (
        [str(config.parent) for config in sorted(path.glob("*/config.yaml"))]
        if path.is_dir()
        else []
    )
    if path.is_file():
        rule = "is a file, not the directory of a run"
        with suppress(UserError):
            fix = f"use {load_spec(path).run_dir}, the directory of the run that it describes"
    elif (run := run_around(path)) is not None:
        rule, fix = "is a part of a run", f"use the directory of the run, {run}"
    elif runs:
        rule, fix = "contains runs, but is not a run", f"for example {runs[-1]}"
    elif not path.exists():
        rule, siblings = (
            "does not exist",
            [*path.parent.glob("*/config.yaml"), *Path("runs").glob("*/config.yaml")],
        )
        near = {config.parent.name: str(config.parent) for config in siblings}
        if meant := nearest(path.name, near):
            fix = f"did you mean {near[meant]}?"
    return UserError("RUN_DIR", str(path), rule, fix)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file atomically: a reader, or a crash, finds either the old text or the new
    one.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
