"""Small parts for unit tests: a tokenizer without training, a model of two layers, and batches."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.tokens import TokenizedPair, tokenize_pair, truncated
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.fused import fuse
from orchestrator.settings.data import DataSpec
from orchestrator.world import World
from support.tiny_settings import TINY_MODEL, write_jsonl

torch.set_num_threads(1)  # for parts this small, threads only wait for one another
ALONE = World(0, 1, 0, torch.device("cpu"))
PAD, EOS = 256, 257
CHAT = (
    "{% for tool in tools or [] %}{{ tool }};{% endfor %}{{ mood or '' }}"
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
TEXT_ROW = {"prompt": "Say it.", "chosen": " yes", "rejected": " no"}
CHAT_ROW = {
    "prompt": [{"role": "user", "content": "Say it."}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, except that "ab" is one token; the chat template marks roles by [u] and
    [a].
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {
        "<pad>": PAD,
        "<end>": EOS,
        "ab": 258,
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer_of_bytes = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    tokenizer_of_bytes.chat_template = CHAT
    return tokenizer_of_bytes


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return tokenizer()(text)["input_ids"]


def tokenized(row: dict[str, Any], **settings: Any) -> TokenizedPair:
    """Return the truncated tokens of a row under settings of `data`."""
    data = data_spec(**settings)
    return truncated(tokenize_pair(row, tokenizer(), data)[0], data)


def pairs_of(folder: Path, content: list[Any], **settings: Any) -> Pairs:
    """The pairs of a JSONL file of these rows."""
    path = write_jsonl(folder / "train.jsonl", content)
    return tokenized_pairs(
        data_spec(train=str(path), **settings), "train", tokenizer(), folder / "cache"
    )


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, packed: bool = False, **config: Any
) -> PreTrainedModel:
    """A Qwen2 of two layers with random weights of some size, so that its log-probs are not all
    alike.

    packed: it takes packed batches too.
    """
    values = {**TINY_MODEL, "vocab_size": 300, "initializer_range": 0.2, **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**values), dtype=dtype).train()
    fuse(model)
    if packed:
        use_packed_attention(model, "cpu")
    return model


def save_adapter(base: Path, out: Path) -> None:
    """A LoRA adapter with random weights for the model in a folder, as peft writes it."""
    from peft import LoraConfig

    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    draw = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.05, generator=draw)
    model.save_pretrained(out)


def change_weights(
    file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Replace the tensors of a safetensors file."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the second of two layers."""
    return {name: value for name, value in weights.items() if ".layers.1." not in name}


def with_third_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a copy of the second layer as a third one."""
    return {
        **weights,
        **{n.replace(".layers.1.", ".layers.2."): v.clone() for n, v in weights.items()},
    }


def data_spec(**settings: Any) -> DataSpec:
    """Data settings with a made-up file."""
    return DataSpec(**{"train": "train.jsonl", **settings})


def pair_rows(pairs: int, seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    """Pairs of random token ids, as `Pairs` hands them to a collator."""
    draw = torch.Generator().manual_seed(seed)

    def some(low: int) -> list[int]:
        length = int(torch.randint(low, longest + 1, (1,), generator=draw))
        return torch.randint(0, 250, (length,), generator=draw).tolist()

    return [
        {"pair_id": number, "prompt_ids": some(1), "chosen_ids": some(1), "rejected_ids": some(1)}
        for number in range(1, pairs + 1)
    ]


def collator(packed: bool, **data: Any) -> PackedCollator | PreferenceCollator:
    """Ours, of either layout."""
    return (
        PackedCollator(data_spec(**data)) if packed else PreferenceCollator(PAD, data_spec(**data))
    )


def pair_batch(
    pairs: int, seed: int = 0, is_filler: bool = False, packed: bool = False
) -> PairBatch:
    """`pair_rows`, collated."""
    return collator(packed)(pair_rows(pairs, seed), is_filler=is_filler)


both_layouts = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
