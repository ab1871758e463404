"""Find damage to the files of a run directory besides checkpoints and ledger; without torch."""

import json
import os
from pathlib import Path
from typing import Any

from orchestrator.training.logged import damaged_line, lines_of, parsed_lines
from orchestrator.training.manifest import MANIFEST, ReadFailed, differing, is_intact
from orchestrator.training.rundir import RunDir
from orchestrator.training.saved import newest_meta


def damage(run_dir: RunDir) -> list[str]:
    """Return one line for each damaged file, with what restores it.

    Raises:
        ReadFailed: the folder of checkpoints cannot be listed at the moment.
    """
    lines, meta = run_dir.damaged_files(), newest_meta(run_dir.checkpoints)
    if os.path.lexists(run_dir.result) and not run_dir.read_result():
        lines.append(f"{run_dir.result}: is damaged")
    if "spec" in meta and not run_dir.read_result().get("files"):
        if not run_dir.config_is_whole(meta):
            lines.append(f"{run_dir.config}: is missing or damaged")
        lines += _metrics_damage(run_dir.metrics, meta) + tokenizer_damage(run_dir.tokenizer)
    if line := run_dir.missing_save():
        lines.append(line)
    return [f"{line}; the next start of the run writes it again" for line in lines]


def _metrics_damage(path: Path, meta: dict[str, Any]) -> list[str]:
    """Compare metrics.jsonl with the history in a checkpoint."""
    history = meta.get("callbacks", {}).get("log_history", [])
    lines, damaged = parsed_lines(path)
    if damaged:
        return [damaged_line(path, damaged)]
    by_step = {line["step"]: line for line in lines}
    wrong = [
        logged["step"]
        for logged in lines_of(history)
        # as text: NaN is not equal to itself
        if any(
            json.dumps(by_step.get(logged["step"], {}).get(name)) != json.dumps(value)
            for name, value in logged.items()
        )
    ]
    return [f"{path}: is not what was logged in step {wrong[0]}"] if wrong else []


def tokenizer_damage(folder: Path) -> list[str]:
    """Return one line for each file of RUN_DIR/tokenizer that is missing or damaged. Earlier
    versions wrote no manifest: then it is whole if it has a config.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return [] if (folder / "config.json").is_file() else [f"{folder}: is missing"]
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or not is_intact(manifest) or "files" not in manifest:
        return [f"{path}: is damaged"]
    try:
        return differing(folder, manifest["files"])
    except ReadFailed as error:
        return [str(error)]
