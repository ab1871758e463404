"""Identify files and folders that are not settings, and name the settings files next to them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.settings.errors import UserError
from orchestrator.settings.near import nearest

SHOWN = 5  # files that a message names
ROWS = (".jsonl", ".parquet", ".csv", ".tsv", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".txt")
ROW_KEYS = {"chosen", "rejected"}
KINDS = {
    ".py": "is Python code",
    ".sh": "is a shell script",
    ".toml": "is TOML",
    ".safetensors": "holds weights",
    ".bin": "holds weights",
    ".gguf": "holds weights",
}


def yaml_files(path: str | Path) -> list[str]:
    """Return the YAML files in a folder, or in the folder of a file, as a user would type them."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = (file for file in folder.glob("*") if file.suffix in (".yaml", ".yml"))
    return sorted(str(file) for file in files if file.is_file())


def missing_file(path: Path) -> UserError:
    """Return the error for a settings file that does not exist, with the files next to it."""
    if is_data(path):
        return UserError("FILE", str(path), "is a data file and does not exist", _set_data(path))
    files, fix = yaml_files(path), "use the path of a YAML file"
    if near := nearest(str(path), files, cutoff=0.75):
        fix = f"did you mean {near}?"
    elif files:
        fix = f"its folder contains {_listed(files)}"
    return UserError("settings file", str(path), "does not exist", fix)


def folder_error(path: str | Path) -> UserError:
    """Return the error for a folder that is not a run directory, which says what it is."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        fix = f"set model.path={path} in a YAML file"
        return UserError("FILE", str(path), "is a model, not settings", fix)
    if any(is_data(file) for file in folder.glob("*")):
        return UserError("FILE", str(path), "is a folder of data, not settings", _set_data(folder))
    if (run := run_around(folder)) is not None:
        fix = f"use the run directory {run}"
        return UserError("FILE", str(path), "is a file or folder inside a run", fix)
    runs = (str(config.parent) for config in sorted(folder.glob("*/config.yaml")))
    files = yaml_files(folder) or list(runs)
    fix = f"it contains {_listed(files)}" if files else "use a YAML file or a run directory"
    return UserError("FILE", str(path), "is a folder but not a run directory", fix)


def run_around(path: Path) -> Path | None:
    """Return the run directory that contains a path, or None."""
    absolute = path.absolute()
    for folder in absolute.parents:
        if (folder / "config.yaml").is_file():
            cwd = Path.cwd()
            return folder.relative_to(cwd) if folder.is_relative_to(cwd) else folder
    return None


def is_data(path: Path) -> bool:
    """Return whether the suffix of a path is that of a data file."""
    return path.suffix.lower() in ROWS


def unreadable_file(path: Path) -> UserError | None:
    """Return the error for a file whose suffix shows that it is not YAML, or None."""
    if is_data(path):
        return UserError("FILE", str(path), "is a data file, not settings", _set_data(path))
    if (kind := KINDS.get(path.suffix.lower())) is not None:
        return UserError("FILE", str(path), f"{kind}, not settings", "use a YAML file")
    return None


def no_settings(path: Path, content: Any) -> UserError | None:
    """Return the error for a YAML or JSON file whose content is not settings, or None."""
    first = content[0] if isinstance(content, list) and content else content
    keys = first.keys() if isinstance(first, dict) else set[str]()
    if keys & ROW_KEYS:
        return UserError("FILE", str(path), "is a data file, not settings", _set_data(path))
    if "zero_optimization" in keys:
        fix = f"set engine.kind=deepspeed engine.deepspeed_config={path}"
        return UserError("FILE", str(path), "is a DeepSpeed config, not settings", fix)
    if "architectures" in keys:
        fix = f"set model.path={path.parent}"
        return UserError("FILE", str(path), "is a model config, not settings", fix)
    return None


def _set_data(path: Path) -> str:
    return f"use a YAML file, followed by data.train={path}"


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + f" and {len(shown) - SHOWN} more" * (len(shown) > SHOWN)
