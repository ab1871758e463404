"""Copy the working directory for a job: code, but no data, models, outputs or secrets."""

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from orchestrator.settings.errors import UserError
from orchestrator.settings.load import FOLDER_KEYS, PATH_KEYS, paths_in
from orchestrator.settings.run import RunSpec

# Not copied, besides what the settings name and git ignores: files that no job needs, secrets, and
# .gitignore, which Ray would apply and might then omit the settings.
EXCLUDED = (
    ".git",
    ".gitignore",
    ".env",
    ".env.*",
    ".netrc",
    ".venv",
    "venv",
    "wandb",
    "__pycache__",
    "*.egg-info",
)
LIMIT_BYTES = 500 * 2**20  # maximum size of a package in Ray


def stage(spec: RunSpec, source: Path, target: Path) -> None:
    """Copy what a job needs from the working directory.

    Links to folders are not followed; unreadable files are skipped.

    Raises:
        UserError: the copy is larger than Ray allows, or a name cannot be in a package.
    """
    source = source.resolve()
    sizes: dict[str, int] = {}  # bytes by the first name below source
    for path in _files_to_copy(spec, source):
        inside = path.relative_to(source)
        if not _is_unicode(inside):
            rule = f"contains {str(inside)!r}, whose name is not UTF-8"
            raise _bad_folder(source, rule, "add it to .gitignore, or move it elsewhere")
        sizes[inside.parts[0]] = sizes.get(inside.parts[0], 0) + path.stat().st_size
        if sum(sizes.values()) > LIMIT_BYTES:
            largest = max(sizes, key=lambda part: sizes[part])
            limit = f"{LIMIT_BYTES >> 20} MB besides data and outputs"
            rule = f"contains more than {limit}, most of it in {largest}"
            raise _bad_folder(source, rule, f"add {largest} to .gitignore, or move it elsewhere")
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target / inside)


def _files_to_copy(spec: RunSpec, source: Path) -> Iterator[Path]:
    """Yield the readable files below a folder that are not excluded."""
    excluded = {path.resolve() for path in _named_by_settings(spec)} | set(_ignored_by_git(source))
    for folder, subfolders, files in os.walk(source):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if not _is_excluded(here / name, excluded)]
        for name in files:
            path = here / name
            is_readable = os.path.isfile(path) and os.access(path, os.R_OK)
            if is_readable and not _is_excluded(path, excluded):
                yield path


def _bad_folder(folder: Path, rule: str, cure: str) -> UserError:
    return UserError("working directory", str(folder), rule, cure)


def _is_excluded(path: Path, excluded: set[Path]) -> bool:
    """Return whether a path, or its target if it is a link, is excluded from the copy."""
    both = (path, path.resolve())
    return not excluded.isdisjoint(both) or any(
        fnmatch.fnmatch(each.name, pattern) for each in both for pattern in EXCLUDED
    )


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _named_by_settings(spec: RunSpec) -> Iterator[Path]:
    """Yield data, models and outputs: a job reads them at their own paths, not from the copy."""
    yield from (spec.run_dir, spec.cache_dir)  # not run.dir, which may be the working directory
    yield from map(Path, paths_in(spec, FOLDER_KEYS + PATH_KEYS).values())


def _ignored_by_git(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that git ignores; none outside a repository.

    Raises:
        UserError: git fails; ignored files may be large or secret, so they must be known.
    """
    which = ["--others", "--ignored", "--exclude-standard", "--directory", "-z"]
    env = {**os.environ, "LC_ALL": "C"}  # its messages are parsed below
    try:
        done = subprocess.run(
            ["git", "ls-files", *which], cwd=folder, env=env, capture_output=True, check=False
        )
    except FileNotFoundError:  # no git
        return
    message = os.fsdecode(done.stderr)
    if done.returncode and "not a git repository" not in message:
        rule = f"git cannot list ignored files there ({' '.join(message.split())[:200]})"
        raise _bad_folder(folder, rule, "fix that, or submit from a copy without .git")
    for name in os.fsdecode(done.stdout).split("\0"):
        if name:
            yield folder / name.rstrip("/")
