"""Rows come in many shapes: each is read as what it says, or refused with what it is and what to
do.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.messages import without_nulls
from orchestrator.data.shapes import EMPTY, IMPLICIT, NO_PROMPT, NULLS, TWICE, checked, note_lines
from orchestrator.settings.errors import UserError
from support.row_shapes import NO, QUESTION, SYSTEM, YES, Row, refusal, turn
from support.tiny_parts import CHAT_ROW, EOS, TEXT_ROW, data_spec, ids, pairs_of, tokenized

ANSWERS = {"chosen": " yes", "rejected": " no"}


def part(text: str, kind: str = "text") -> Row:
    return {"type": kind, "text": text}


WHOLE = {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}
FOLLOWED_UP = [QUESTION, turn("assistant", "What?"), turn("user", "It.")]


# --- shapes that are read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Say it.", **WHOLE},  # as in ultrafeedback_binarized
        {"prompt": " Say it.\n", **WHOLE, "messages": WHOLE["chosen"]},
        {"prompt": [QUESTION], **WHOLE},
        {"prompt": "Say it.", "chosen": [YES], "rejected": [NO]},
        {"prompt": "Say it.", "chosen": YES, "rejected": NO},
        {"prompt": [QUESTION], "chosen": YES, "rejected": NO},
        {"prompt": QUESTION, "chosen": [YES], "rejected": [NO]},
        {"prompt": [QUESTION], "chosen": "yes", "rejected": "no"},
        {"prompt": [turn("user", [part("Say "), part("it.")])], "chosen": [YES], "rejected": [NO]},
        {
            "prompt": [QUESTION],
            "chosen": [turn("assistant", [part("yes", "output_text")])],
            "rejected": NO,
        },
        {
            "prompt": None,
            "chosen": [turn("user", [part("Say it.")]), YES],
            "rejected": [QUESTION, NO],
        },
        {
            "prompt": [{**QUESTION, "name": None, "tool_calls": None}],
            "chosen": [YES],
            "rejected": [NO],
            "tools": None,
        },
        {
            "prompt": [{"role": "user", "content": [{**part("Say it."), "image": None}]}],
            "chosen": YES,
            "rejected": NO,
        },
    ],
)
def test_shapes_of_one_conversation_give_the_same_tokens(row: Row) -> None:
    assert tokenized(row) == tokenized(CHAT_ROW)


def test_a_prompt_text_may_be_any_question_of_the_conversation_before_the_answers() -> None:
    sides = {"chosen": [SYSTEM, *FOLLOWED_UP, YES], "rejected": [SYSTEM, *FOLLOWED_UP, NO]}
    expected = {"prompt": [SYSTEM, *FOLLOWED_UP], "chosen": [YES], "rejected": [NO]}
    for prompt in ("Say it.", "It."):
        assert checked({"prompt": prompt, **sides}, data_spec()).row == expected
    for prompt in ("What?", "Say", ""):
        assert (
            "prompt is text, but chosen and rejected are conversations"
            in refusal({"prompt": prompt, **sides}).reason
        )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_prompt_that_one_side_repeats_is_not_trained_twice(side: str) -> None:
    row = {"prompt": [SYSTEM, QUESTION], "chosen": [YES], "rejected": [NO]}
    for repeated in ([SYSTEM, QUESTION], [QUESTION], [SYSTEM], [turn("system", "Another.")]):
        bad = refusal({**row, side: [*repeated, *row[side]]})
        assert f"{side} starts with a {repeated[0]['role']} message" in bad.reason
        assert "remove the prompt column" in bad.cure


def test_a_prompt_repeated_by_its_completions_is_reported() -> None:
    row = {
        "prompt": "How do you do?",
        "chosen": "How do you do? Well.",
        "rejected": "How do you do? Badly.",
    }
    assert checked(row, data_spec()).notes == (TWICE,)
    assert checked({**row, "rejected": "Badly."}, data_spec()).notes == ()


# --- nulls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_null_answer_is_another_message_than_a_missing_column(column: str) -> None:
    assert refusal({**TEXT_ROW, column: None}).reason == f"{column} is null"
    assert refusal(
        {name: text for name, text in TEXT_ROW.items() if name != column}
    ).reason.startswith(f"has no column {column!r}")


def test_nulls_in_objects_are_absent_values_and_nulls_in_lists_stay() -> None:
    value = {"a": None, "b": {"c": None, "d": [None, {"e": None, "f": 0}]}, "g": ""}
    assert without_nulls(value) == {"b": {"d": [None, {"f": 0}]}, "g": ""}


TOOL = {"name": "f", "parameters": {"zone": {"type": "string"}}}
NULL_TOOL = {
    "name": "f",
    "default": None,
    "parameters": {"city": None, "zone": {"type": "string", "enum": None}},
}


def test_nulls_in_tools_are_left_out_and_counted_and_tools_as_text_keep_them() -> None:
    plain, with_nulls = ({**CHAT_ROW, "tools": [tool]} for tool in (TOOL, NULL_TOOL))
    assert tokenized(with_nulls) == tokenized(plain)
    assert checked(with_nulls, data_spec()).notes == (NULLS,)
    assert checked(plain, data_spec()).notes == ()
    as_text = tokenized({**CHAT_ROW, "tools": json.dumps([NULL_TOOL])})
    assert as_text.prompt_ids == ids(f"{NULL_TOOL};[u]Say it.~[a]")


def test_parquet_and_jsonl_give_the_same_tokens_where_arrow_adds_nulls(tmp_path: Path) -> None:
    import datasets

    from orchestrator.data.pair_cache import tokenized_pairs
    from support.tiny_parts import tokenizer

    def call(**arguments: Any) -> Row:
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"arguments": arguments}}],
        }

    content = [
        {**CHAT_ROW, "tools": [TOOL], "chat_template_kwargs": {"mood": "sad"}},
        {
            **CHAT_ROW,
            "chosen": [call(city="Rome")],
            "tools": [{"name": "g", "parameters": {"city": {"type": "string"}}}],
        },
        {**CHAT_ROW, "chosen": [call(zone="CET")], "chat_template_kwargs": {"x": 1}},
    ]
    jsonl = pairs_of(tmp_path, content)
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(content).to_parquet(str(path))
    parquet = tokenized_pairs(data_spec(train=str(path)), "train", tokenizer(), tmp_path / "cache")
    assert [parquet.tokens(index).tolist() for index in range(3)] == [
        jsonl.tokens(index).tolist() for index in range(3)
    ]
    assert parquet.notes == jsonl.notes == {}
    assert parquet.unread == jsonl.unread


# --- what is no text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**TEXT_ROW, "images": ["a.png"]}, "has images, but only text is supported"),
        ({**CHAT_ROW, "audio": {"path": "a.wav"}}, "has audio"),
        ({**CHAT_ROW, "video": "a.mp4"}, "has video"),
        (
            {**CHAT_ROW, "prompt": [turn("user", [part("Say it."), {"type": "image"}])]},
            "message 1 of prompt has a part of type 'image'",
        ),
        (
            {**CHAT_ROW, "chosen": turn("assistant", [{"type": "image_url", "image_url": "x"}])},
            "type 'image_url'",
        ),
        (
            {**CHAT_ROW, "chosen": turn("assistant", ["yes"])},
            "message 1 of chosen has a part of type 'str'",
        ),
        (
            {**CHAT_ROW, "chosen": turn("assistant", [{"type": "text", "text": None}])},
            "a part of type 'text'",
        ),
        (
            {**CHAT_ROW, "chosen": turn("assistant", {"text": "yes"})},
            "message 1 of chosen has dict as content, not text",
        ),
        (
            {**CHAT_ROW, "chosen": turn("assistant", 3)},
            "message 1 of chosen has int as content, not text",
        ),
        (
            {**CHAT_ROW, "chosen": ["yes", "oui"]},
            "message 1 of chosen is str, not an object with role and content",
        ),
        ({**TEXT_ROW, "chosen": 4.5}, "chosen is float, neither text nor a list of messages"),
        ({**TEXT_ROW, "prompt": True}, "prompt is bool"),
        ({**TEXT_ROW, "chosen": json.dumps([YES])}, "chosen is a list of messages as text"),
        (
            {**TEXT_ROW, "prompt": str([{"from": "human", "value": "x"}])},
            "prompt is a list of messages as text",
        ),
    ],
)
def test_what_is_not_text_is_refused_with_the_reason(row: Row, reason: str) -> None:
    assert reason in refusal(row).reason


def test_blank_columns_of_images_are_no_images() -> None:
    for blank in (None, "", []):
        assert tokenized({**TEXT_ROW, "images": blank}) == tokenized(TEXT_ROW)


HALF = "smile \ud83d"


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({**TEXT_ROW, "prompt": HALF}, "prompt"),
        ({**TEXT_ROW, "rejected": HALF}, "rejected"),
        ({"chosen": HALF + "a", "rejected": HALF + "b"}, "chosen"),
        ({**CHAT_ROW, "chosen": [turn("assistant", HALF)]}, "chosen"),
        ({**CHAT_ROW, "prompt": [turn("user", [part(HALF)])]}, "prompt"),
        ({**CHAT_ROW, "tools": [{"name": HALF}]}, "tools"),
        ({**CHAT_ROW, "tools": json.dumps([{"name": HALF}])}, "tools"),
        ({**CHAT_ROW, "chat_template_kwargs": {HALF: 1}}, "chat_template_kwargs"),
    ],
)
def test_half_of_a_surrogate_pair_is_named_and_dropped_where_rows_may_be(
    tmp_path: Path, row: Row, column: str
) -> None:
    assert f"{column} is not Unicode text: '\\ud83d' at character 7" in refusal(row).reason
    with pytest.raises(
        UserError, match=rf"data\.train row 2 = .*: {column} is not Unicode text"
    ) as caught:
        pairs_of(tmp_path, [TEXT_ROW, row])
    assert str(caught.value).isascii()
    assert pairs_of(tmp_path, [TEXT_ROW, row], on_bad_row="drop").dropped == {"malformed rows": 1}


def test_odd_but_valid_text_is_read() -> None:
    assert tokenized({**TEXT_ROW, "chosen": "a\x00b"})[1] == [*ids("a\x00b"), EOS]
    checked({**TEXT_ROW, "note": HALF, HALF: 1}, data_spec())  # nothing reads these
    assert list(note_lines({"note": 1, HALF: 1}, {})) == ["columns not read: note, smile \\ud83d"]


def test_a_row_that_is_nested_too_deeply_is_named() -> None:
    tools: Any = []
    for _ in range(3000):
        tools = [tools]
    assert refusal({**CHAT_ROW, "tools": tools}).reason == "is nested too deeply"


# --- columns that hold a part of the question -----------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "What?", "system": "Be kind.", **ANSWERS}, "'question', 'system'"),  # orca
        ({"instruction": "What?", "input": "", **ANSWERS}, "'instruction'"),  # alpaca
        ({"system": "", "input": "What?", **ANSWERS, "status": "tie"}, "'input'"),
        # "The " is no prompt
        ({"query": "What?", "chosen": "The one", "rejected": "The other"}, "'query'"),
        ({"frage": "Wie geht es?", "id": "12", **ANSWERS}, "'frage'"),
        ({"conversations": [{"from": "human", "value": "What?"}], **ANSWERS}, "'conversations'"),
        ({"dialog": [turn("user", "What?")], "chosen": [YES], "rejected": [NO]}, "'dialog'"),
    ],
)
def test_a_row_without_prompt_does_not_lose_its_question(row: Row, columns: str) -> None:
    bad = refusal(row)
    assert (
        f"has no prompt, and {columns}, which could be part of it, would be ignored" in bad.reason
    )
    assert "into prompt, or set data.ignore_columns=[" in bad.cure


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("system", "Be kind."),
        ("system_prompt", "Be kind."),
        ("history", [["Hi", "Hello"]]),
        ("input", "To wit."),
        ("context", {"page": "A text."}),
        ("messages", [turn("user", "Another.")]),
    ],
)
def test_a_part_of_the_question_beside_the_prompt_is_refused_or_ignored_by_a_setting(
    column: str, value: Any
) -> None:
    for row in (TEXT_ROW, CHAT_ROW):
        bad = refusal({**row, column: value})
        assert f"has {column!r} besides prompt, which does not contain its text" in bad.reason
        result = checked({**row, column: value}, data_spec(ignore_columns=[column]))
        assert result.unread == (column,)
        assert {**result.row, column: None} == {**row, column: None}


def test_columns_that_the_prompt_contains_or_that_say_nothing_are_only_named() -> None:
    row = {
        **TEXT_ROW,
        "question": "Say  it.",
        "system": "",
        "history": [],
        "score": 0,
        "id": None,
        "source": "a b",
    }
    assert checked(row, data_spec()).unread == ("question", "score", "source")
    row = {
        **CHAT_ROW,
        "messages": [QUESTION, YES],
        "tools": [TOOL],
        "w": 1.0,
        "chat_template_kwargs": {"mood": 1},
    }
    assert checked(row, data_spec(weight_column="w")).unread == ("messages",)
    assert checked({**TEXT_ROW, "tools": [TOOL]}, data_spec()).unread == ("tools",)


def test_unread_columns_are_counted_over_all_rows(tmp_path: Path) -> None:
    content = [
        {**TEXT_ROW, "score": 1},
        {**TEXT_ROW, "score": 2, "prompt": ""},
        {"chosen": "a b", "rejected": "a c"},
    ]
    pairs = pairs_of(tmp_path, [*content, {**TEXT_ROW, "chosen": "", "id": "x"}])
    assert pairs.unread_columns == pairs.sets[0].unread_columns == {"score": 2, "id": 1}
    assert pairs.notes == {NO_PROMPT: 1, IMPLICIT: 1, EMPTY: 1}
    assert list(note_lines(pairs.unread_columns, pairs.notes))[:2] == [
        "columns not read: score, id",
        f"rows that {NO_PROMPT}: 1",
    ]
