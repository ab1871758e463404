"""List, verify and delete checkpoints: a folder is a checkpoint if it has a manifest.

Does not import torch.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.durable import sha256_of
from orchestrator.settings.errors import UserError

FORMAT = 4
MANIFEST = "manifest.json"
SEAL = "sha256"  # of the rest of a JSON document, as a key of it
# names of disabled manifests
CORRUPT, UNREADABLE = ("manifest.corrupt.json", "manifest.unreadable.json")


class ManifestFiles(NamedTuple):
    """The files listed in a manifest, name -> sha256."""

    files: dict[str, str]  # in the checkpoint's folder, without the manifest itself
    parts: dict[str, str]  # of the pair ledger; they outlive the checkpoint


class ReadFailed(OSError):
    """A checkpoint could not be read this time; its content may be intact."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps before the checkpoint in this folder."""
    return int(folder.name.removeprefix("step_"))


def retain(checkpoints: Path, keep: int, best: Path | None = None) -> None:
    """Delete all but the best and the newest `keep` committed checkpoints, and leftovers of
    crashes; on rank 0 only.

    The manifest is deleted first, so that an interrupted deletion leaves no incomplete checkpoint.
    """
    kept = [*committed(checkpoints)[:keep], best]
    for folder in checkpoints.glob("step_*"):
        if folder not in kept and not (folder / UNREADABLE).exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def set_aside(checkpoints: Path, valid: Path) -> None:
    """Disable the committed checkpoints newer than `valid`, the result of `newest_valid`; on rank 0
    only.

    Otherwise they would still be the newest, and `retain` would delete new ones in favour of them.
    `retain` deletes corrupt checkpoints, but not those of which only the manifest is broken.
    """
    for folder in committed(checkpoints):
        if folder.name > valid.name:
            (folder / MANIFEST).rename(
                folder / (UNREADABLE if listed_in(folder) is None else CORRUPT)
            )


def committed(checkpoints: Path) -> list[Path]:
    """Return the folders with a manifest, newest first, without reading it.

    Raises:
        ReadFailed: the folder cannot be listed at the moment; a glob would silently return nothing.
    """
    try:
        folders = [
            path
            for path in checkpoints.iterdir()
            if path.name.startswith("step_") and _is_there(path)
        ]
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
    """Return the defects of a checkpoint, one line per file; empty if it is complete.

    share: (rank, size) checks every size-th file, for ranks that share the work.

    Raises:
        UserError: it has another format.
        ReadFailed: a file exists but cannot be read at the moment.
    """
    listed = listed_in(folder)
    if listed is None:
        return [f"{folder / MANIFEST}: is not a manifest, or is damaged"]
    return differing(folder, dict(sorted(listed.files.items())[share[0] :: share[1]]))


def differing(folder: Path, files: dict[str, str]) -> list[str]:
    """Return one line for each of these files that is missing or has another sha256.

    Raises ReadFailed.
    """
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


def listed_in(folder: Path) -> ManifestFiles | None:
    """Return the files that a checkpoint's manifest lists; None if it is not a valid manifest.

    Raises like `verify`.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        return None
    except OSError as error:
        raise _unread(path, error) from None
    if not isinstance(manifest, dict) or "format" not in manifest or not is_intact(manifest):
        return None
    if manifest["format"] != FORMAT:
        # manifests of formats 1 to 3 have no seal, those of later ones have
        if SEAL not in manifest and manifest["format"] not in range(1, FORMAT):
            return None
        cure = "use the version of this program that wrote it, or choose another run.name"
        raise UserError(
            f"{path} format", manifest["format"], f"this version reads format {FORMAT}", cure
        )
    if not isinstance(manifest.get("files"), dict):
        return None
    return ManifestFiles(manifest["files"], manifest.get("ledger", {}))


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON document with its sha256, by which a reader notices damage."""
    return {**document, SEAL: _digest(document)}


def is_intact(document: dict[str, Any]) -> bool:
    """Return whether a document is as `sealed` returned it; earlier versions wrote no seal."""
    return SEAL not in document or document[SEAL] == _digest(document)


def _digest(document: dict[str, Any]) -> str:
    content = {name: value for name, value in document.items() if name != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unread(path: Path, error: OSError) -> ReadFailed:
    reason = error.strerror or type(error).__name__
    return ReadFailed(f"{path} cannot be read now ({reason}); nothing was changed, try again later")
