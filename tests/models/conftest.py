"""Fixtures of the tests in this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.settings.run import RunSpec
from support.references import SIZES
from support.tiny_parts import (
    tiny_model,
    tokenizer,
)
from support.tiny_settings import tiny_spec


@pytest.fixture
def spec_of(tmp_path: Path) -> Callable[..., RunSpec]:
    """Settings whose model is `tiny_model(**SIZES)` on disk."""
    tiny_model(**SIZES).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")

    def spec_of(model: dict[str, Any] | None = None, **reference: Any) -> RunSpec:
        return tiny_spec(
            tmp_path,
            model={"init": None, "path": str(tmp_path / "base"), **(model or {})},
            reference=reference,
        )

    return spec_of


@pytest.fixture(scope="module")
def no_memory_is_zero_by_chance() -> Iterator[None]:
    """Deterministic mode fills new tensors with NaN, so that one that is read before it is written
    shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
