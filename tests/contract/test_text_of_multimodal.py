"""A multimodal model trains on text on two ranks as on one, under every engine; its vision tower
stays as it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.engine_runs import ENGINES
from support.gloo_ranks import Ranks
from support.tiny_parts import tokenizer
from support.tiny_settings import random_rows, raw_settings, write_jsonl
from support.worker_runs import curve

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multimodal")
    write_jsonl(root / "train.jsonl", random_rows(8, longest=4))
    write_jsonl(root / "eval.jsonl", random_rows(2, seed=1, longest=4))
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    config = AutoConfig.for_model(
        "gemma3", text_config=SIZES, vision_config=vision, mm_tokens_per_image=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[Ranks, Ranks]]:
    with Ranks(2) as both, Ranks(1) as alone:
        yield both, alone


def settings(folder: Path, engine: str) -> dict[str, Any]:
    model = {"init": None, "path": str(folder / "base")}
    more = {"data": {"eval": None}, "run": {"name": engine}, "training": {"max_steps": 3}}
    return raw_settings(folder, model=model, engine=ENGINES[engine], **more)


@pytest.mark.parametrize(
    "engine",
    ["ddp", *[pytest.param(each, marks=pytest.mark.slow) for each in ENGINES if each != "ddp"]],
)
def test_the_text_part_of_a_multimodal_model_trains_equally_on_two_ranks(
    pools: tuple[Ranks, Ranks], folder: Path, engine: str
) -> None:
    losses = pools[0].call(curve, settings(folder, engine))[0]
    [expected] = pools[1].call(curve, settings(folder, "ddp"))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert abs(losses[-1] - losses[0]) > 1e-3
