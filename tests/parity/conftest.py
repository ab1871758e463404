"""Fixtures of the tests in this folder."""

from typing import Any

import pytest

from orchestrator.models.policy import load_tokenizer
from support.tiny_settings import random_rows, tiny_spec, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE with a ChatML template, trained on plain rows; big enough to have words as
    tokens.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "train.jsonl", random_rows(64))
    return load_tokenizer(
        tiny_spec(folder, model={"init": {"model_type": "qwen2", "vocab_size": 400}})
    )
