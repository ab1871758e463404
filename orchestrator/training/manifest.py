"""Which checkpoints there are and whether they are whole: a folder counts when it has a manifest. Loads no torch."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from orchestrator.settings.spec import UserError

FORMAT = 4
MANIFEST = "manifest.json"
CORRUPT, UNREADABLE = "manifest.corrupt.json", "manifest.unreadable.json"  # names of manifests that count no more


class Listed(NamedTuple):
    """What a manifest speaks for: names and sha256."""

    files: dict[str, str]  # in the checkpoint's folder, all but the manifest itself
    parts: dict[str, str]  # of the pair ledger, which outlive the checkpoint


class ReadFailed(OSError):
    """A checkpoint could not be read this time, which says nothing about its content."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer steps after which the checkpoint in this folder was made."""
    return int(folder.name.removeprefix("step_"))


def retain(checkpoints: Path, keep: int, best: Path | None = None) -> None:
    """Delete all but the best and the newest `keep` committed checkpoints, and what crashes have left; rank zero alone.

    The manifest goes first, so that a deletion cut short leaves no half checkpoint.
    """
    kept = [*committed(checkpoints)[:keep], best]
    for folder in checkpoints.glob("step_*"):
        if folder not in kept and not (folder / UNREADABLE).exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(checkpoints: Path, valid: Path) -> None:
    """Let the committed checkpoints newer than `valid`, which `newest_valid` found, count no more; rank zero alone.

    Left in place they would still be the newest, and `retain` would delete new ones for them. It deletes corrupt ones,
    but not files against which only a broken manifest speaks.
    """
    for folder in committed(checkpoints):
        if folder.name > valid.name:
            (folder / MANIFEST).rename(folder / (UNREADABLE if listed_in(folder) is None else CORRUPT))


def committed(checkpoints: Path) -> list[Path]:
    """Folders with a manifest, newest first; its content is not looked at.

    Raises:
        ReadFailed: whether there are any cannot be seen now; a glob would pass over them in silence.
    """
    try:
        folders = [path for path in checkpoints.iterdir() if path.name.startswith("step_") and _is_there(path)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unread(checkpoints, error) from None
    return sorted(folders, reverse=True)


def _is_there(folder: Path) -> bool:
    try:
        (folder / MANIFEST).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint: one line per file, empty when it is whole.

    share: (rank, size) looks at every size-th file, for ranks that check together.

    Raises:
        UserError: it has another format.
        ReadFailed: a file is there and cannot be read now.
    """
    listed = listed_in(folder)
    if listed is None:
        return [f"{folder / MANIFEST}: is not a manifest"]
    return differing(folder, dict(sorted(listed.files.items())[share[0] :: share[1]]))


def differing(folder: Path, files: dict[str, str]) -> list[str]:
    """One line for each of these files that is missing or has another sha256. Raises ReadFailed as `verify` does."""
    wrong = []
    for name, expected in files.items():
        path = folder / name
        try:
            if sha256_of(path) != expected:
                wrong.append(f"{path}: its content is not what was written")
        except FileNotFoundError:
            wrong.append(f"{path}: is missing")
        except OSError as error:
            raise _unread(path, error) from None
    return wrong


def listed_in(folder: Path) -> Listed | None:
    """What a checkpoint's manifest lists; None where it is not a manifest. Raises as `verify` does."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        return None
    except OSError as error:
        raise _unread(path, error) from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        return None
    if manifest["format"] != FORMAT:
        cure = "take the version of this program that wrote it, or choose another run.name"
        raise UserError(f"{path} format", manifest["format"], f"this version reads format {FORMAT}", cure)
    if not isinstance(manifest.get("files"), dict):
        return None
    return Listed(manifest["files"], manifest.get("ledger", {}))


def _unread(path: Path, error: OSError) -> ReadFailed:
    reason = error.strerror or type(error).__name__
    return ReadFailed(f"{path} cannot be read now ({reason}); nothing was changed, try again when it can be")


def sha256_of(path: Path) -> str:
    """Of its content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced_sha256(path: Path) -> str:
    """The same, when the content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
