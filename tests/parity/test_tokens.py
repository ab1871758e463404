"""Our token ids and masks are TRL's, for every shape of row that both accept, every kind of
tokenizer and template.
"""

import copy
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from orchestrator.data.collate import PackedCollator, PairBatch, PreferenceCollator
from orchestrator.data.pairs import Pairs, tokenized_pairs
from orchestrator.data.sources import BadRow
from orchestrator.data.tokens import tokenize_pair
from orchestrator.models.policy import CHAT_TEMPLATE, load_tokenizer
from orchestrator.settings.data import DataSpec
from support.tiny_settings import random_rows, tiny_spec, write_jsonl
from support.trl_trainer import need_trl, trl_tokens, trl_trainer

need_trl()

Row = dict[str, Any]


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


LONG = "red stone river garden copper " * 6
STRINGS: list[Row] = [
    *random_rows(8, seed=3),
    {"prompt": "Say red", "chosen": " green", "rejected": " blue lamp"},
    {"prompt": "Say red ", "chosen": "green", "rejected": "blue"},  # " green" would be one token
    {"prompt": "two\n", "chosen": "\nlines", "rejected": "\nrivers\n"},
    {
        "prompt": "naïve 🙂",
        "chosen": " ça va 🙂🙃",
        "rejected": " 漢字",
    },  # bytes without a merge of their own
    {
        "prompt": "ends already",
        "chosen": " good<|im_end|>",
        "rejected": " bad",
    },  # EOS is not doubled
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
    {
        "chosen": "Say red: a good lamp",
        "rejected": "Say red: bad chairs",
    },  # a space precedes the difference
    {
        "chosen": "Say red: zzz",
        "rejected": "Say red: qqq",
    },  # and is a token of its own, as nothing merges with it
    {"chosen": "Say red: green", "rejected": "Say red: grey"},
    {
        "chosen": "Say red: green river",
        "rejected": "Say red: green",
    },  # rejected is a beginning of chosen
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


def settings(**keys: Any) -> DataSpec:
    return DataSpec.model_validate({"train": "", **keys})


def ours(folder: Path, rows: list[Row], tokenizer: Any, data: DataSpec) -> Pairs:
    source = str(write_jsonl(folder / "rows.jsonl", rows))
    return tokenized_pairs(
        DataSpec(**{**data.model_dump(), "train": source}), "train", tokenizer, folder / "cache"
    )


def theirs(rows: list[Row], tokenizer: Any, max_length: int | None = None) -> list[Row]:
    """Return the rows that TRL makes of a table."""
    from datasets import Dataset

    return trl_tokens(Dataset.from_list(rows), tokenizer, max_length)


@cache
def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def mask_of(batch: PairBatch) -> torch.Tensor:
    """[2B, T - 1], 1 where the next token is scored, rebuilt from the indices; checks that those
    agree.
    """
    halves = (
        torch.arange(2 * len(batch.pair_ids)).view(2, -1).t().flatten()
    )  # chosen and rejected pair by pair
    sequence = halves.repeat_interleave(torch.tensor(batch.scored))
    assert torch.equal(batch.completion_index // batch.input_ids.shape[1], sequence)
    assert torch.equal(
        batch.input_ids.flatten()[batch.completion_index + 1], batch.completion_labels
    )
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    mask[batch.completion_index] = 1
    return mask.view_as(batch.input_ids)[:, :-1]


def assert_packed_as(batch: PairBatch, expected: dict[str, torch.Tensor]) -> None:
    """The sequences that a packed row holds, and the tokens that are scored in them, are those of
    TRL's batch.
    """
    assert batch.segments is not None
    row = batch.input_ids[0]
    labels = iter(batch.completion_labels.split(list(batch.scored)))
    for number, span in enumerate(batch.segments.spans):
        chosen = row[span.start : span.rejected]
        rejected = torch.cat([row[span.start : span.fork], row[span.rejected : span.stop]])
        for place, sequence in ((number, chosen), (number + len(batch.pair_ids), rejected)):
            kept = expected["attention_mask"][place].bool()
            scored = expected["completion_mask"][place][kept][1:].bool()
            assert torch.equal(sequence, expected["input_ids"][place][kept])
            assert torch.equal(next(labels), sequence[1:][scored])


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [24, 1024, None])
@pytest.mark.parametrize("name", ROWS)
def test_ids_and_masks_equal_trls(
    name: str, max_length: int | None, truncation: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    if name == "tools":
        tokenizer, max_length = (
            with_template(tokenizer, TOOL_TEMPLATE),
            None,
        )  # its prompts are longer than 24
    data = settings(max_length=max_length, truncation=truncation)
    pairs = ours(tmp_path, ROWS[name], tokenizer, data)
    other = theirs(ROWS[name], tokenizer, max_length if truncation == "keep_start" else None)
    mine = [pairs[index] for index in range(len(pairs))]

    assert len(mine) == len(other)
    for row, trl_row in zip(mine, other, strict=True):
        assert row["prompt_ids"] == trl_row["prompt_ids"]
        # keep_start is applied when we tokenise, and by TRL's collator
        room = (
            max_length - len(row["prompt_ids"])
            if max_length and truncation == "keep_start"
            else None
        )
        assert row["chosen_ids"] == trl_row["chosen_ids"][:room]
        assert row["rejected_ids"] == trl_row["rejected_ids"][:room]

    padded, packed = PreferenceCollator(tokenizer.pad_token_id, data), PackedCollator(data)
    trl_collator = DataCollatorForPreference(tokenizer.pad_token_id, max_length, truncation)
    for some in (
        slice(None),
        slice(0, 1),
        slice(1, 3),
    ):  # the width of a batch depends on what is in it
        batch, expected = padded(mine[some]), trl_collator(other[some])
        assert torch.equal(batch.input_ids, expected["input_ids"])
        assert batch.attention_mask is not None
        assert torch.equal(batch.attention_mask, expected["attention_mask"])
        assert torch.equal(mask_of(batch), expected["completion_mask"][:, 1:])
        assert_packed_as(packed(mine[some]), expected)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_trl_tokens_are_those_its_trainer_trains_on(
    truncation: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = AutoConfig.for_model("qwen2", vocab_size=400, num_key_value_heads=1, **sizes)
    policy, reference = (
        AutoModelForCausalLM.from_config(config) for _ in range(2)
    )  # nothing here runs them
    trainer = trl_trainer(
        tmp_path,
        policy,
        tokenizer,
        LONG_CHATS,
        ref_model=reference,
        max_length=24,
        truncation_mode=truncation,
    )
    assert list(trainer.train_dataset) == theirs(
        LONG_CHATS, tokenizer, 24 if truncation == "keep_start" else None
    )
    collator = trainer.data_collator
    assert (
        collator.pad_token_id,
        collator.max_length,
        collator.truncation_mode,
        collator.pad_to_multiple_of,
    ) == (
        tokenizer.pad_token_id,
        24,
        truncation,
        None,
    )


def as_parts(messages: list[Row]) -> list[Row]:
    """Messages whose contents are cut into two parts."""
    cut = [(message["content"][:3], message["content"][3:]) for message in messages]
    parts = [[{"type": "text", "text": text} for text in texts] for texts in cut]
    return [
        {**message, "content": content} for message, content in zip(messages, parts, strict=True)
    ]


PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ "
    "m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif "
    "%}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% "
    "endif %}"
)
JSON_TEMPLATE = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}\n{% endfor %}"


def test_contents_of_parts_give_trls_ids_where_the_template_reads_parts(tokenizer: Any) -> None:
    """Ours joins them for every template; of one that does not read parts TRL trains on Python's
    repr of the list.
    """
    rows = [
        {side: as_parts(messages) for side, messages in row.items()}
        for row in (*CHATS, *IMPLICIT_CHATS[:2])
    ]
    for row in rows:
        assert_trls(row, with_template(tokenizer, PARTS_TEMPLATE))
        plain, _ = tokenize_pair(row, tokenizer, settings())
        assert plain == tokenize_pair(row, with_template(tokenizer, PARTS_TEMPLATE), settings())[0]


def test_a_prompt_text_beside_whole_conversations_gives_what_trl_makes_without_it(
    tokenizer: Any,
) -> None:
    for row in IMPLICIT_CHATS[:2]:
        question = row["chosen"][-2]["content"]
        expected, _ = tokenize_pair(row, tokenizer, settings())
        assert tokenize_pair({"prompt": question, **row}, tokenizer, settings())[0] == expected
        assert_trls(row, tokenizer)


def test_nulls_that_a_table_adds_are_left_out_as_by_trls_own_function(tokenizer: Any) -> None:
    from datasets import Dataset
    from trl.trainer.utils import remove_none_values

    tokenizer, rows = with_template(tokenizer, JSON_TEMPLATE), []
    for row, arguments in zip(CHATS, ({"city": "Rome"}, {"zone": "CET"}), strict=False):
        call = {"function": {"name": "f", "arguments": arguments}}
        answer = [{**turn("assistant", "so"), "tool_calls": [call]}]
        rows.append({**row, "chosen": answer, "tools": [{"name": "f", "parameters": arguments}]})

    def without_nulls(batch: Row) -> Row:
        return {
            name: [remove_none_values(value) for value in column] for name, column in batch.items()
        }

    table = Dataset.from_list(rows)
    assert "None" in str(table[0])
    expected = trl_tokens(table.with_transform(without_nulls), tokenizer)
    for row, theirs_of_row in zip(table, expected, strict=True):
        pair, _ = tokenize_pair(row, tokenizer, settings())
        assert pair._asdict() == {name: theirs_of_row[name] for name in pair._fields}


def test_prompts_that_fill_max_length_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    """The comparison above would also hold if no row were long enough: some are, and some only just
    fit.
    """
    pairs = ours(tmp_path, LONG_ROWS, tokenizer, settings(max_length=24))
    prompts = pairs.lengths[:, 0].tolist()

    assert pairs.dropped["prompts that fill data.max_length"] > 1
    assert set(pairs.dropped) == {"prompts that fill data.max_length"}
    assert max(prompts) == 23
    assert 24 in [len(tokenizer(row["prompt"])["input_ids"]) for row in LONG_ROWS]
    assert (pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max() == 24


def test_some_tokens_merge_across_the_boundary(tokenizer: Any, tmp_path: Path) -> None:
    """As above: rows whose prompt alone has other tokens than the prompt within the whole are
    really among them.
    """
    pairs = ours(tmp_path, MERGING, tokenizer, settings())
    alone = [len(tokenizer(row["prompt"])["input_ids"]) for row in MERGING]

    assert all(
        kept < whole for kept, whole in zip(pairs.lengths[:, 0].tolist(), alone, strict=True)
    )


# --- kinds of tokenizers, and templates -----------------------------------------------------------

KINDS = ["bytes", "bytes with BOS", "unigram", "wordpiece"]
SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "[CLS]",
    "[SEP]",
]


@cache
def tokenizer_of(kind: str) -> Any:
    """A tokenizer that learned from plain rows, with BOS, EOS and a ChatML template."""
    from transformers import PreTrainedTokenizerFast

    backend, trainer = _untrained(kind)
    backend.train_from_iterator([text for row in random_rows(64) for text in row.values()], trainer)
    framed = {"bytes with BOS": "<s> $A", "unigram": "<s> $A", "wordpiece": "[CLS] $A [SEP]"}.get(
        kind
    )
    if framed:
        tokens = [(token, backend.token_to_id(token)) for token in ("<s>", "[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single=framed, special_tokens=tokens)
    tokenizer_of_bytes = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="[CLS]" if kind == "wordpiece" else "<s>",
        eos_token="[SEP]" if kind == "wordpiece" else "</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer_of_bytes.chat_template = CHAT_TEMPLATE
    return tokenizer_of_bytes


def _untrained(kind: str) -> tuple[Any, Any]:
    if (
        kind == "unigram"
    ):  # as Llama 2's and Gemma's: words with their space, no token for what was never seen
        backend: Any = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"
        )
    elif kind == "wordpiece":  # as BERT's: lower case, no white space
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.ByteLevel(False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    trainer.show_progress = False
    return backend, trainer


@cache
def template_of(name: str) -> str:
    """One of those that TRL brings along."""
    (trl,) = importlib.util.find_spec("trl").submodule_search_locations
    return (Path(trl) / "chat_templates" / f"{name}.jinja").read_text()


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_trls_ids(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for name, rows in ROWS.items():
        if name == "tools":
            tokenizer = with_template(tokenizer, TOOL_TEMPLATE)
        mine = [tokenize_pair(row, tokenizer, settings())[0]._asdict() for row in rows]
        assert mine == [{key: row[key] for key in mine[0]} for row in theirs(rows, tokenizer)]


def test_the_kinds_of_tokenizers_differ_where_it_matters() -> None:
    """As above: BOS and an end after the end are really there, and what merges or is unknown is."""
    rows = {kind: tokenize_pair(MERGING[0], tokenizer_of(kind), settings()) for kind in KINDS}
    first, last = {}, {}
    for kind, (pair, _) in rows.items():
        tokens = tokenizer_of(kind).convert_ids_to_tokens(pair.prompt_ids + pair.chosen_ids)
        first[kind], last[kind] = tokens[0], tokens[-2:]
    assert [first[kind] == tokenizer_of(kind).bos_token for kind in KINDS] == [
        False,
        True,
        True,
        True,
    ]
    assert last["wordpiece"] == ["[SEP]", "[SEP]"]  # the text's, and the post-processor's
    assert all(rows[kind][1] for kind in ("bytes", "bytes with BOS", "wordpiece"))
    assert tokenizer_of("unigram").unk_token_id in tokenizer_of("unigram")("漢字")["input_ids"]


# --- random rows ----------------------------------------------------------------------------------

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
PIECES += [
    *SPECIAL,
    "<think>\nhm\n</think>\n\n",
    "</think>",
    "A",
    "'s",
    "\t",
    "\u00a0",
    "\r\n",
    "0.5",
]
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), st.text(max_size=6))
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.just({"name": "f"})}),
    max_size=2,
)
# What each template reads: of TRL's own, those with reasoning, of which some drop that of earlier
# turns, with {% generation %}, with tools, with a BOS of their own; those that strip, or put the
# system prompt elsewhere.
READ: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "": {"tools": tools | tools.map(json.dumps), "style": texts},
    "qwen2_5": {"tools": tools},
    "qwen3": {"tools": tools, "enable_thinking": st.booleans()},
    "deepseek_r1_distill": {},
    "gemma": {},
    "gemma3_training": {},
    "llama3": {},
    "llama3_2": {"tools": tools, "date_string": st.just("26 Jul 2024")},
    "glm4moe": {"tools": tools, "enable_thinking": st.booleans()},
    "cohere_training": {},
    "phi3": {},
}


@st.composite
def assistant(draw: st.DrawFn, reads_tools: bool = False) -> Row:
    message = turn("assistant", draw(texts))
    if draw(st.booleans()):
        message["reasoning_content"] = draw(texts)
    if reads_tools and draw(st.integers(0, 3)) == 0:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": "f", "arguments": {"x": draw(texts)}}}
        ]
    return message


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, Row]:
    """(a template's name, a row of messages that suit it)."""
    name = draw(st.sampled_from(list(READ)))
    answers = assistant("tools" in READ[name])
    prompt = [turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [turn("user", draw(texts)), draw(answers)]
    prompt.append(turn("user", draw(texts)))
    sides = []
    for _ in range(2):
        side = [draw(answers)]
        if draw(st.integers(0, 3)) == 0:
            side += [turn("user", draw(texts)), draw(answers)]
        sides.append(side)
    row: Row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    if draw(st.booleans()):
        row = {"chosen": prompt + sides[0], "rejected": prompt + sides[1]}
    for key, values in READ[name].items():
        if draw(st.booleans()):
            if key == "tools":
                row["tools"] = draw(values)
            else:
                row.setdefault("chat_template_kwargs", {})[key] = draw(values)
    return name, row


two_hundred = hypothesis_settings(max_examples=200, deadline=None, database=None, derandomize=True)


@two_hundred
@given(example=conversations(), kind=st.sampled_from(KINDS))
def test_random_conversations_give_trls_ids(example: tuple[str, Row], kind: str) -> None:
    name, row = example
    tokenizer = with_template(tokenizer_of(kind), template_of(name) if name else TOOL_TEMPLATE)
    assert_trls(row, tokenizer)


@two_hundred
@given(
    prompt=texts, chosen=texts, rejected=texts, implicit=st.booleans(), kind=st.sampled_from(KINDS)
)
@example("Say ", " red", " red lamp", True, "unigram")
def test_random_texts_give_trls_ids(
    prompt: str, chosen: str, rejected: str, implicit: bool, kind: str
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if implicit:
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
        # TRL raises where one is empty; where the first letters differ it looks for a space before
        # them, at the end
        assume(row["chosen"] and row["rejected"])
        assume(row["chosen"][0] == row["rejected"][0] or row["chosen"][-1] != " ")
    assert_trls(row, tokenizer_of(kind))
