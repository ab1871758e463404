"""Rows and tokenizers for the comparison of tokens with TRL."""

import copy
import json
import re
from functools import cache
from typing import Any

import pytest
from hypothesis import strategies as st

from orchestrator.data.row import BadRow
from orchestrator.data.tokens import tokenize_pair
from orchestrator.models.new_model import CHAT_TEMPLATE
from orchestrator.settings.data import DataSpec
from support.tiny_settings import random_rows
from support.trl_trainer import trl_tokens

Row = dict[str, Any]


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


LONG = "red stone river garden copper " * 6
STRINGS: list[Row] = [
    *random_rows(8, seed=3),
    {"prompt": "Say red", "chosen": " green", "rejected": " blue lamp"},
    {"prompt": "Say red ", "chosen": "green", "rejected": "blue"},  # " green" would be one token
    {"prompt": "two\n", "chosen": "\nlines", "rejected": "\nrivers\n"},
    # bytes without a merge of their own
    {"prompt": "naïve 🙂", "chosen": " ça va 🙂🙃", "rejected": " 漢字"},
    # EOS is not doubled
    {"prompt": "ends already", "chosen": " good<|im_end|>", "rejected": " bad"},
    {"prompt": "", "chosen": "green river", "rejected": "blue"},
]
# Tokens that merge across the boundary: "gar" + "den", where the tokenizer has "garden" as one
# token.
MERGING: list[Row] = [
    {"prompt": "Say a gar", "chosen": "den good", "rejected": "lic bad"},
    {"prompt": "Say a gar", "chosen": "lic good", "rejected": "den bad"},
    {"prompt": "Say a re", "chosen": "d lamp", "rejected": "d chair"},
    {"prompt": "Say win", "chosen": "dow", "rejected": "ter"},
]
CHATS: list[Row] = [
    *random_rows(6, seed=4, conversational=True),
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
    # a space precedes the difference
    {"chosen": "Say red: a good lamp", "rejected": "Say red: bad chairs"},
    # and is a token of its own, as nothing merges with it
    {"chosen": "Say red: zzz", "rejected": "Say red: qqq"},
    {"chosen": "Say red: green", "rejected": "Say red: grey"},
    # rejected is a beginning of chosen
    {"chosen": "Say red: green river", "rejected": "Say red: green"},
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
        "rejected": [
            *SKY,
            turn("assistant", "blue"),
            turn("user", "again"),
            turn("assistant", "red"),
        ],
    },
]
# With max_length 24: prompts longer than that, one that fills it exactly, and completions that are
# cut.
LONG_ROWS: list[Row] = [
    {"prompt": LONG, "chosen": " good lamp", "rejected": " bad"},
    {"prompt": "Say red", "chosen": " good " + LONG, "rejected": " bad"},
    {"prompt": "Say red", "chosen": " good", "rejected": " bad " + LONG},
    {"prompt": "Say red", "chosen": " good " + LONG, "rejected": " bad " + LONG},
    *(
        {"prompt": "Say" + " red" * count, "chosen": " good lamp", "rejected": " bad"}
        for count in range(18, 27)
    ),
]
LONG_CHATS: list[Row] = [
    {
        "prompt": [turn("user", row["prompt"])],
        "chosen": [turn("assistant", row["chosen"])],
        "rejected": [turn("assistant", row["rejected"])],
    }
    for row in LONG_ROWS
]
# Columns that only a chat template sees; TRL takes tools as JSON text, since rows of a table have
# one type.
TOOLS: list[Row] = [
    {**row, "tools": json.dumps([{"name": name}]), "chat_template_kwargs": {"style": style}}
    for row, name, style in zip(
        random_rows(3, seed=5, conversational=True), ("red", "blue", "red"), "aab", strict=True
    )
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


def settings(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"train": "", **keys})


def theirs(rows: list[Row], tokenizer: Any, max_length: int | None = None) -> list[Row]:
    """Return the rows that TRL makes of a table."""
    from datasets import Dataset

    return trl_tokens(Dataset.from_list(rows), tokenizer, max_length)


@cache
def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@cache
def stream() -> tuple[list[Row], Any]:
    """Rows, and what TRL reads them from one by one; a table would give each row the keys of
    all.
    """
    from datasets import IterableDataset

    rows: list[Row] = []
    return rows, IterableDataset.from_generator(lambda: iter(rows))


def assert_trls(row: Row, tokenizer: Any) -> None:
    """Ids of one row, before anything is cut or dropped; what its template refuses, ours must
    refuse as well.
    """
    from jinja2 import TemplateError

    rows, dataset = stream()
    rows[:] = [row]
    try:
        (expected,) = trl_tokens(dataset, tokenizer)
    except TemplateError as error:
        with pytest.raises(BadRow, match=f"the chat template rejects it: {re.escape(str(error))}"):
            tokenize_pair(row, tokenizer, settings())
        return
    pair, _ = tokenize_pair(row, tokenizer, settings())
    assert pair._asdict() == {name: expected[name] for name in pair._fields}


PIECES = [
    "red",
    " ",
    " gar",
    "den",
    "\n",
    "\n\n",
    "naïve",
    "🙂",
    "漢字",
    "e\u0301",
    "\u200b",
    "  green river",
    "{{ x }}",
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), st.text(max_size=6))
