"""Recognise git-lfs pointers: small text files in place of large files that were not downloaded."""

from pathlib import Path

from orchestrator.settings.errors import UserError

LFS_POINTER = b"version https://git-lfs"


def is_lfs_pointer(file: str | Path) -> bool:
    """Return whether the file holds a git-lfs pointer instead of its content."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:  # the reader of the file reports this error in more detail
        return False


def check_no_lfs_pointer(key: str, source: str, file: str | Path) -> None:
    """Check that a file is not a git-lfs pointer.

    Args:
        key: the setting that names the file or its folder.
        source: the value of that setting.
        file: the file to check.

    Raises:
        UserError: the file is a git-lfs pointer.
    """
    if is_lfs_pointer(file):
        name = "it" if str(file) == source else Path(file).name
        rule = f"{name} is a git-lfs pointer, not the file itself"
        raise UserError(key, source, rule, f"run `git lfs pull` in {Path(file).parent}")
