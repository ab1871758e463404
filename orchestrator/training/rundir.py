"""The run directory: its paths, its lock and the file that requests a stop."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.durable import write_atomically
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import (
    FOLDER_KEYS,
    PATH_KEYS,
    SettingsSource,
    load_spec,
    save_spec,
    saved_spec,
)
from orchestrator.settings.near import nearest
from orchestrator.settings.os_errors import os_errors
from orchestrator.settings.run import RunSpec, changed_on_resume
from orchestrator.settings.wrong_file import run_around
from orchestrator.training import ownership
from orchestrator.training.logged import damaged_line, parsed_lines
from orchestrator.training.manifest import SEAL, committed, differing, is_intact, sealed, step_of
from orchestrator.training.saved import newest_meta, settings_in

logger = logging.getLogger(__name__)

NEWEST_PAIRS = "newest.parquet"  # in pairs.parquet: the newest rows, a copy of the checkpoint's


class RunDir:
    """The paths below run.dir/run.name; the constructor neither reads nor writes anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.attempts = path / "attempts.jsonl"
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
        self.last_save = path / ".last_save"  # the step of the newest checkpoint

    def stop_reason(self) -> str | None:
        """Return why the file STOP requests a stop, or None."""
        try:
            return self.stop.read_text().strip() or "RUN_DIR/STOP exists"
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # its content does not matter
            return "RUN_DIR/STOP exists" if os.path.lexists(self.stop) else None

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
        with os_errors({"RUN_DIR": path}, "RUN_DIR"):
            is_run = run_dir.config.is_file()
            if not (is_run or any(run_dir.checkpoints.glob("step_*/manifest.json"))):
                raise _not_a_run(Path(path))
        return run_dir

    def settings(self) -> SettingsSource:
        """Return the settings of the run, for `load_spec`: config.yaml or, if it is missing or
        damaged, those in the newest checkpoint.
        """
        meta = newest_meta(self.checkpoints)
        if self.config_is_whole(meta):
            return self.config
        message = "%s is missing or damaged: the settings in the checkpoint of step %d are used"
        logger.warning(message, self.config, meta["step"])
        return meta["spec"]

    def config_is_whole(self, meta: dict[str, Any]) -> bool:
        """Return whether config.yaml agrees with the settings in a checkpoint's meta.json, or there
        are none; the paths of files may differ.
        """
        if (trained := settings_in(meta)) is None:
            return True
        written = saved_spec(self.config)
        return written is not None and _only_paths(changed_on_resume(trained, written))

    def check(self, spec: RunSpec) -> None:
        """Check that a resumed run has the settings in its newest checkpoint, except those that may
        change. `Checkpointer` checks models, tokenizer and pairs on the ranks.

        The paths of models and data may also change if somebody has edited config.yaml in the same
        way: the files were moved.

        Raises:
            UserError: the directory belongs to a run with other settings.
            ReadFailed: the folder of checkpoints cannot be listed at the moment.
        """
        if self.saved_step() is None:
            return  # nothing was trained yet, so all settings may change
        written = saved_spec(self.config)
        trained = settings_in(newest_meta(self.checkpoints)) or written
        if trained is None:
            return  # no checkpoint is complete, which `choose_checkpoint` reports
        changes = changed_on_resume(trained, spec)
        follows_config = written is not None and not changed_on_resume(written, spec)
        if changes and not (follows_config and _only_paths(changes)):
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

        Raises:
            UserError: checkpoints were saved, and none is left.
        """
        self.check_checkpoints()
        if line := self.missing_save():
            logger.warning("%s; an older checkpoint is used", line)
        for line in self.damaged_files():
            logger.warning("%s; it is written again from the last checkpoint", line)
        with self._os_errors():
            for folder in (self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            save_spec(spec, self.config)
            self.result.unlink(missing_ok=True)

    def check_checkpoints(self) -> None:
        """Check that a run that saved before has a checkpoint, and does not start over in silence.

        Raises:
            UserError: it has none.
        """
        if (saved := self.saved_step()) is not None and not committed(self.checkpoints):
            rule = f"was saved up to step {saved}, but {self.checkpoints} has no checkpoint"
            cure = f"restore it, or choose another run.name, or remove {self.path} to start over"
            raise UserError("run.dir", str(self.path), rule, cure)

    def note_save(self, step: int) -> None:
        """Note the step of a committed checkpoint, so that its loss is noticed; on rank 0 only."""
        with suppress(OSError):  # the next save tries again
            write_atomically(self.last_save, json.dumps(sealed({"step": step})))

    def missing_save(self) -> str | None:
        """Return a line if the newest checkpoint that was saved is missing, but an older one is
        there.
        """
        saved, newest = self.saved_step(), committed(self.checkpoints)
        if saved is None or not newest or step_of(newest[0]) == saved:
            return None
        return f"{self.checkpoints}: the checkpoint of step {saved} is missing"

    def saved_step(self) -> int | None:
        """Return the step of the newest checkpoint that was ever saved; None if there was none."""
        steps = [step_of(folder) for folder in committed(self.checkpoints)[:1]]
        if "step" in (noted := _sealed_document(self.last_save)):
            steps.append(noted["step"])
        if not steps and any(self.pairs.glob("*.parquet")):  # only a committed save writes them
            steps.append(max((int(line["step"]) for line in self.metric_lines()), default=0))
        return max(steps, default=None)

    @contextmanager
    def owned(self) -> Iterator[int]:
        """Own the directory, as two drivers of one run would overwrite each other; yield the
        descriptor that holds the lock.

        It is free again when this process and those that inherit the descriptor end, however they
        do.

        Raises:
            UserError: another process owns it.
        """
        path, rule, cure = self.path, "cannot be created", "set run.dir to another folder"
        try:
            path.mkdir(parents=True, exist_ok=True)
            path, rule, cure = self.lock, "cannot be opened", f"remove it, or {cure}"
            path.touch()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError("run.dir", str(path), f"{rule} ({reason})", cure) from None
        is_new = self.saved_step() is None and not self.config.exists()
        with ExitStack() as stack:
            with self._os_errors():
                owned = ownership.owned(self.lock, self.path.name, is_new=is_new)
                lock = stack.enter_context(owned)
                # a request to an earlier attempt; later ones are for this attempt
                self.stop.unlink(missing_ok=True)
            yield lock

    def _os_errors(self) -> AbstractContextManager[None]:
        return os_errors({"run.dir": str(self.path)}, "run.dir")

    def owner(self) -> str | None:
        """Return the process that owns the directory, on any machine; None if none does."""
        return ownership.owner_of(self.lock)

    def metric_lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, and name those that are damaged in a warning."""
        lines, damaged = parsed_lines(self.metrics)
        if damaged:
            logger.warning("%s, which is not used", damaged_line(self.metrics, damaged))
        return lines

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result of the run, for the process that started it."""
        write_atomically(self.result, json.dumps(sealed(result)))

    def read_result(self) -> dict[str, Any]:
        """Return the result of the last attempt; empty if it has not ended, or died, or if the file
        is damaged.
        """
        return _sealed_document(self.result)

    def damaged_files(self) -> list[str]:
        """Return one line for each file of a finished run that is missing or was changed."""
        files, lines = self.read_result().get("files", {}), list[str]()
        for name, digest in files.items():
            try:
                lines += differing(self.path, {name: digest})
            except OSError as error:
                lines.append(f"{self.path / name}: cannot be read ({error})")
        return lines


def _sealed_document(path: Path) -> dict[str, Any]:
    """Return the document in a file; empty if it is missing, unreadable or damaged."""
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text())
        if isinstance(document, dict) and is_intact(document):
            return {name: value for name, value in document.items() if name != SEAL}
    return {}


def _only_paths(changes: list[tuple[str, Any, Any]]) -> bool:
    """Return whether all changes are of paths, whose content the ranks compare by hash."""
    return all(key in (*PATH_KEYS, *FOLDER_KEYS) for key, *_ in changes)


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
