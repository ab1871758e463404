"""Our token ids and masks are TRL's, for every shape of row that both accept."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.parity_support import need_trl, trl_trainer
from support import rows as made_rows
from support import tiny_spec, write_jsonl

from orchestrator.data.collate import PairBatch, PreferenceCollator
from orchestrator.data.pairs import Pairs, tokenized_pairs
from orchestrator.models.policy import CHAT_TEMPLATE, load_tokenizer
from orchestrator.settings.spec import DataSpec

need_trl()

Row = dict[str, Any]


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


LONG = "red stone river garden copper " * 6
STRINGS: list[Row] = [
    *made_rows(8, seed=3),
    {"prompt": "Say red", "chosen": " green", "rejected": " blue lamp"},
    {"prompt": "Say red ", "chosen": "green", "rejected": "blue"},  # " green" would be one token
    {"prompt": "two\n", "chosen": "\nlines", "rejected": "\nrivers\n"},
    {"prompt": "naïve 🙂", "chosen": " ça va 🙂🙃", "rejected": " 漢字"},  # bytes without a merge of their own
    {"prompt": "ends already", "chosen": " good<|im_end|>", "rejected": " bad"},  # EOS is not doubled
    {"prompt": "", "chosen": "green river", "rejected": "blue"},
]
# Tokens that merge across the boundary: "gar" + "den", where the tokenizer has "garden" as one token.
MERGING: list[Row] = [
    {"prompt": "Say a gar", "chosen": "den good", "rejected": "lic bad"},
    {"prompt": "Say a gar", "chosen": "lic good", "rejected": "den bad"},
    {"prompt": "Say a re", "chosen": "d lamp", "rejected": "d chair"},
    {"prompt": "Say win", "chosen": "dow", "rejected": "ter"},
]
CHATS: list[Row] = [
    *made_rows(6, seed=4, conversational=True),
    {
        "prompt": [turn("system", "Speak of stone."), turn("user", "Say red")],
        "chosen": [turn("assistant", "red stone")],
        "rejected": [turn("assistant", "blue")],
    },
    {
        "prompt": [turn("user", "Say red"), turn("assistant", "red"), turn("user", "Say blue")],
        "chosen": [turn("assistant", "blue river")],
        "rejected": [turn("assistant", "red")],
    },
    {
        "prompt": [turn("system", ""), turn("user", "Say red")],
        "chosen": [turn("assistant", "red"), turn("user", "again"), turn("assistant", "red red")],
        "rejected": [turn("assistant", "no")],
    },
]
IMPLICIT_STRINGS: list[Row] = [
    {"chosen": "Say red: a good lamp", "rejected": "Say red: bad chairs"},  # a space precedes the difference
    {"chosen": "Say red: zzz", "rejected": "Say red: qqq"},  # and is a token of its own, as nothing merges with it
    {"chosen": "Say red: green", "rejected": "Say red: grey"},
    {"chosen": "Say red: green river", "rejected": "Say red: green"},  # rejected is a beginning of chosen
    {"chosen": "Say red", "rejected": "Say red stone"},
    {"chosen": "Say  two", "rejected": "Say  river"},  # two spaces: one of them moves
]
SKY = [turn("user", "red")]
STONE = [turn("system", "Speak of stone."), turn("user", "Say red")]
IMPLICIT_CHATS: list[Row] = [
    {"chosen": [*SKY, turn("assistant", "red")], "rejected": [*SKY, turn("assistant", "blue")]},
    {"chosen": [*STONE, turn("assistant", "red")], "rejected": [*STONE, turn("assistant", "blue")]},
    {  # rejected is a beginning of chosen
        "chosen": [*SKY, turn("assistant", "red"), turn("user", "again"), turn("assistant", "red")],
        "rejected": [*SKY, turn("assistant", "red")],
    },
    {  # they differ in the middle
        "chosen": [*SKY, turn("assistant", "red"), turn("user", "again"), turn("assistant", "red")],
        "rejected": [*SKY, turn("assistant", "blue"), turn("user", "again"), turn("assistant", "red")],
    },
]
# With max_length 24: prompts longer than that, one that fills it exactly, and completions that are cut.
LONG_ROWS: list[Row] = [
    {"prompt": LONG, "chosen": " good lamp", "rejected": " bad"},
    {"prompt": "Say red", "chosen": " good " + LONG, "rejected": " bad"},
    {"prompt": "Say red", "chosen": " good", "rejected": " bad " + LONG},
    {"prompt": "Say red", "chosen": " good " + LONG, "rejected": " bad " + LONG},
    *({"prompt": "Say" + " red" * count, "chosen": " good lamp", "rejected": " bad"} for count in range(18, 27)),
]
LONG_CHATS: list[Row] = [
    {
        "prompt": [turn("user", row["prompt"])],
        "chosen": [turn("assistant", row["chosen"])],
        "rejected": [turn("assistant", row["rejected"])],
    }
    for row in LONG_ROWS
]
# Columns that only a chat template sees; TRL takes tools as JSON text, since rows of a table have one type.
TOOLS: list[Row] = [
    {**row, "tools": json.dumps([{"name": name}]), "chat_template_kwargs": {"style": style}}
    for row, name, style in zip(made_rows(3, seed=5, conversational=True), ("red", "blue", "red"), "aab", strict=True)
]
TOOL_TEMPLATE = "{{ style }}{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
# Each is a data set of its own: TRL looks at the first row to decide what all of them are.
ROWS = {
    "strings": STRINGS,
    "merging": MERGING,
    "chats": CHATS,
    "implicit_strings": IMPLICIT_STRINGS,
    "implicit_chats": IMPLICIT_CHATS,
    "long": LONG_ROWS,
    "long_chats": LONG_CHATS,
    "tools": TOOLS,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE with a ChatML template, trained on plain rows; big enough to have words as tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "train.jsonl", made_rows(64))
    return load_tokenizer(tiny_spec(folder, model={"init": {"model_type": "qwen2", "vocab_size": 400}}))


@pytest.fixture(scope="module")
def model() -> Any:
    """The smallest that TRL's trainer takes; nothing here runs it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", vocab_size=400, num_key_value_heads=1, **sizes)
    )


def settings(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"train": "", **keys})


def ours(folder: Path, rows: list[Row], tokenizer: Any, data: DataSpec) -> Pairs:
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    return tokenized_pairs(data.model_copy(update={"train": source}), "train", tokenizer, folder / "cache")


def mask_of(batch: PairBatch) -> torch.Tensor:
    """[2B, T - 1], 1 where the next token is scored, rebuilt from the indices; checks that those agree."""
    halves = torch.arange(2 * len(batch.pair_ids)).view(2, -1).t().flatten()  # chosen and rejected pair by pair
    sequence = halves.repeat_interleave(torch.tensor(batch.scored))
    assert torch.equal(batch.completion_index // batch.input_ids.shape[1], sequence)
    assert torch.equal(batch.input_ids.flatten()[batch.completion_index + 1], batch.completion_labels)
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    mask[batch.completion_index] = 1
    return mask.view_as(batch.input_ids)[:, :-1]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [24, 1024, None])
@pytest.mark.parametrize("name", ROWS)
def test_ids_and_masks_are_trls(
    name: str, max_length: int | None, truncation: Any, tokenizer: Any, model: Any, tmp_path: Path
) -> None:
    data = settings(max_length=max_length, truncation=truncation)
    if name == "tools":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = TOOL_TEMPLATE
        max_length, data = None, data.model_copy(update={"max_length": None})  # its prompts are longer than 24
    pairs = ours(tmp_path, ROWS[name], tokenizer, data)
    trainer = trl_trainer(
        tmp_path / "trl",
        copy.deepcopy(model),  # a trainer patches its models
        tokenizer,
        ROWS[name],
        ref_model=copy.deepcopy(model),
        max_length=max_length,
        truncation_mode=truncation,
    )
    theirs = list(trainer.train_dataset)
    mine = [pairs[index] for index in range(len(pairs))]

    assert len(mine) == len(theirs)
    for row, other in zip(mine, theirs, strict=True):
        assert row["prompt_ids"] == other["prompt_ids"]
        # keep_start is applied when we tokenise, and by TRL's collator
        room = max_length - len(row["prompt_ids"]) if max_length and truncation == "keep_start" else None
        assert row["chosen_ids"] == other["chosen_ids"][:room]
        assert row["rejected_ids"] == other["rejected_ids"][:room]

    collator = PreferenceCollator(tokenizer.pad_token_id, data)
    for some in (slice(None), slice(0, 1), slice(1, 3)):  # the width of a batch depends on what is in it
        batch, expected = collator(mine[some]), trainer.data_collator(theirs[some])
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, expected["attention_mask"])
        assert torch.equal(mask_of(batch), expected["completion_mask"][:, 1:])


def test_prompts_that_fill_max_length_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    """The comparison above would also hold if no row were long enough: some are, and some only just fit."""
    pairs = ours(tmp_path, LONG_ROWS, tokenizer, settings(max_length=24))
    prompts = pairs.lengths[:, 0].tolist()

    assert pairs.dropped["prompts that fill data.max_length"] > 1
    assert set(pairs.dropped) == {"prompts that fill data.max_length"}
    assert max(prompts) == 23
    assert 24 in [len(tokenizer(row["prompt"])["input_ids"]) for row in LONG_ROWS]
    assert (pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max() == 24


def test_some_tokens_merge_across_the_boundary(tokenizer: Any, tmp_path: Path) -> None:
    """As above: rows whose prompt alone has other tokens than the prompt within the whole are really among them."""
    pairs = ours(tmp_path, MERGING, tokenizer, settings())
    alone = [len(tokenizer(row["prompt"])["input_ids"]) for row in MERGING]

    assert all(kept < whole for kept, whole in zip(pairs.lengths[:, 0].tolist(), alone, strict=True))
