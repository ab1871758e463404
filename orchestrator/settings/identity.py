"""The block run: name, folder and seed of a run."""

import re

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.settings.base import FREE, Block, Seed


class IdentitySpec(Block):
    """Name and folder of the run; the run directory is dir/name."""

    dir: str = Field("runs", json_schema_extra=FREE)
    """Folder of run directories, on a file system that every node shares.

    Relative to the current folder.
    """
    name: str
    """Name of the run: the same name resumes the same run. Letters, digits, dot, dash, underscore.
    """
    seed: Seed = 42
    """Seed of the data order, of random initial weights and of dropout. An integer."""

    @field_validator("name")
    @classmethod
    def _check_folder_name(cls, value: str) -> str:
        # excludes .., .cache and flags
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", value):
            rule = (
                "must be 1 to 200 letters, digits, '.', '-' and '_', and start with a letter, "
                "digit or '_'"
            )
            raise PydanticCustomError("run_name", rule)  # pyright: ignore[reportArgumentType]
        return value
