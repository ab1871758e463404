"""Fixtures of the tests in this folder."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orchestrator.models.policy import load_tokenizer
from support.reference_parity import PAIRS, Home, model_of
from support.tiny_settings import random_rows, tiny_spec, write_jsonl


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how many share a sum decides its rounding
    folder, rows = tmp_path_factory.mktemp("references"), random_rows(PAIRS, seed=11)
    write_jsonl(folder / "train.jsonl", random_rows(64))  # of the tokenizer
    write_jsonl(folder / "pairs.jsonl", rows)
    tokenizer = load_tokenizer(tiny_spec(folder, data={"eval": None}))
    actual = Home(folder, rows, tokenizer)
    model_of(tokenizer, seed=5).save_pretrained(actual.model)
    tokenizer.save_pretrained(actual.model)
    yield actual
    torch.set_num_threads(threads)


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
