"""One row becomes the token ids that TRL makes of it."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.row import BadRow
from orchestrator.settings.errors import UserError
from support.tiny_parts import CHAT_ROW, EOS, TEXT_ROW, ids, pairs_of, tokenized, tokenizer


def test_text_ends_with_the_end_token_once() -> None:
    assert tokenized(TEXT_ROW) == (ids("Say it."), [*ids(" yes"), EOS], [*ids(" no"), EOS])
    assert tokenized({**TEXT_ROW, "chosen": " yes<end>"}) == tokenized(TEXT_ROW)


def test_a_conversation_ends_as_its_template_says() -> None:
    assert tokenized(CHAT_ROW) == (ids("[u]Say it.~[a]"), ids("yes~"), ids("no~"))


def test_tools_and_template_options_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for value in (tools, json.dumps(tools)):
        row = {**CHAT_ROW, "tools": value, "chat_template_kwargs": {"mood": "gay"}}
        assert tokenized(row)[0] == ids(f"{tools[0]};gay[u]Say it.~[a]")


@pytest.mark.parametrize(
    ("everyones", "own", "reached"),
    [
        ({"mood": "glad"}, {}, "glad"),
        ({"mood": "glad"}, {"chat_template_kwargs": {"mood": "sad"}}, "sad"),
        # how Parquet says that it has none
        ({"mood": "glad"}, {"chat_template_kwargs": {"mood": None}}, "glad"),
        ({"tools": [{"a": 1}]}, {}, "{'a': 1};"),
        ({"tools": [{"a": 1}], "mood": "glad"}, {"tools": [{"b": 2}]}, "{'b': 2};glad"),
        ({"tools": [{"a": 1}]}, {"tools": "[]"}, ""),
    ],
)
def test_a_rows_own_template_options_win(
    everyones: dict[str, Any], own: dict[str, Any], reached: str
) -> None:
    assert tokenized({**CHAT_ROW, **own}, chat_template_kwargs=everyones)[0] == ids(
        reached + "[u]Say it.~[a]"
    )


@pytest.mark.parametrize(
    ("before", "prompt"),
    [
        ([], "[s]Be kind.~[u]Say it.~[a]"),
        ([{"role": "system", "content": "No."}], "[s]No.~[u]Say it.~[a]"),
        ([{"role": "developer", "content": ""}], "[d]~[u]Say it.~[a]"),
    ],
)
def test_a_system_prompt_is_for_conversations_without_one(before: list[Any], prompt: str) -> None:
    row = {**CHAT_ROW, "prompt": before + CHAT_ROW["prompt"]}
    assert tokenized(row, system_prompt="Be kind.") == (ids(prompt), ids("yes~"), ids("no~"))
    implicit = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    assert tokenized(implicit, system_prompt="Be kind.") == (ids(prompt), ids("yes~"), ids("no~"))


@pytest.mark.parametrize("side", ["chosen", "rejected", "both"])
def test_the_completion_starts_where_either_side_leaves_the_prompt(side: str) -> None:
    row = {
        "prompt": "xa",
        "chosen": "b1" if side != "rejected" else "c",
        "rejected": "b2" if side != "chosen" else "d",
    }
    # "ab" is one token: the a of the prompt is not there any more
    prompt, chosen, rejected = tokenized(row)
    assert prompt == ids("x")
    assert chosen == [*ids("a" + row["chosen"]), EOS]
    assert rejected == [*ids("a" + row["rejected"]), EOS]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "rest"),
    [
        ("Hi: one", "Hi: two", "Hi:", (" one", " two")),
        ("Hi: to", "Hi: two", "Hi: t", ("o", "wo")),
        ("same", "same more", "sam", ("e", "e more")),
        ("one", "two", "", ("one", "two")),
    ],
)
def test_an_implicit_prompt_is_the_common_beginning(
    chosen: str, rejected: str, prompt: str, rest: tuple[str, str]
) -> None:
    assert tokenized({"chosen": chosen, "rejected": rejected}) == (
        ids(prompt),
        [*ids(rest[0]), EOS],
        [*ids(rest[1]), EOS],
    )


def test_an_implicit_prompt_of_a_conversation() -> None:
    row = {side: CHAT_ROW["prompt"] + CHAT_ROW[side] for side in ("chosen", "rejected")}
    assert tokenized(row) == tokenized({**row, "prompt": None}) == tokenized(CHAT_ROW)


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [
        (None, ("pppp", "ccc.", "rr.")),
        (8, ("pppp", "ccc.", "rr.")),
        (7, ("pppp", "ccc", "rr.")),
        (5, ("pppp", "c", "r")),
    ],
)
def test_keep_start_cuts_completions(
    max_length: int | None, expected: tuple[str, str, str]
) -> None:
    actual = tokenized({"prompt": "pppp", "chosen": "ccc", "rejected": "rr"}, max_length=max_length)
    assert actual == tuple(
        [t for part in ids(text) for t in [EOS if [part] == ids(".") else part]]
        for text in expected
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_prompt_length": 9}, ("12345678", "hijkl.", "vw.")),
        ({"max_prompt_length": 3}, ("678", "hijkl.", "vw.")),
        ({"max_completion_length": 6}, ("12345678", "hijkl.", "vw.")),
        ({"max_completion_length": 3}, ("12345678", "hij", "vw.")),
        # a prompt that would have filled it
        ({"max_prompt_length": 3, "max_length": 7}, ("678", "hijk", "vw.")),
        ({"max_completion_length": 2, "max_length": 9}, ("12345678", "h", "v")),
        ({"max_completion_length": 2, "max_length": 20}, ("12345678", "hi", "vw")),
        (
            {
                "max_prompt_length": 3,
                "max_completion_length": 2,
                "max_length": 4,
                "truncation": "keep_end",
            },
            None,
        ),
    ],
)
def test_prompts_keep_their_end_and_completions_their_start(
    settings: dict[str, Any], expected: Any
) -> None:
    actual = tokenized({"prompt": "12345678", "chosen": "hijkl", "rejected": "vw"}, **settings)
    texts = expected or ("678", "hi", "vw")
    assert actual == tuple(
        [t for part in text for t in ([EOS] if part == "." else ids(part))] for text in texts
    )


def test_keep_end_is_left_to_the_collator() -> None:
    assert tokenized(TEXT_ROW, max_length=3, truncation="keep_end") == tokenized(TEXT_ROW)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (["not", "an object"], "malformed rows", "is of type list"),
        (
            {"prompt": "a", "chosen": "b"},
            "malformed rows",
            "no column 'rejected'; its columns are 'prompt', 'chosen'",
        ),
        ({**TEXT_ROW, "chosen": None}, "malformed rows", "chosen is null"),
        ({**TEXT_ROW, "chosen": 3}, "malformed rows", "chosen is int"),
        (
            {"chosen": "text", "rejected": CHAT_ROW["rejected"]},
            "malformed rows",
            "mixes text and messages: chosen is text, rejected is messages",
        ),
        ({**CHAT_ROW, "prompt": []}, "malformed rows", "empty list"),
        (
            {**CHAT_ROW, "chosen": [{"content": "x"}]},
            "malformed rows",
            "message 1 of chosen has no role",
        ),
        (
            {**CHAT_ROW, "chosen": [{"role": "assistant", "content": 3}]},
            "malformed rows",
            "message 1 of chosen has int as content, not text",
        ),
        ({**CHAT_ROW, "tools": "[not JSON"}, "malformed rows", "tools"),
        (
            {**CHAT_ROW, "tools": {"name": "f"}},
            "malformed rows",
            "tools is neither a list of objects",
        ),
        ({**CHAT_ROW, "tools": '["f"]'}, "malformed rows", "tools is neither a list of objects"),
        ({**CHAT_ROW, "chat_template_kwargs": "text"}, "malformed rows", "chat_template_kwargs"),
        (
            {**CHAT_ROW, "chat_template_kwargs": {"padding": True}},
            "malformed rows",
            "'padding', which is not a",
        ),
        ({**TEXT_ROW, "rejected": " yes"}, "ties", "chosen equals rejected"),
        (
            {**TEXT_ROW, "prompt": "long " * 9},
            "prompts that fill data.max_length",
            "45 tokens, data.max_length is 40",
        ),
        ({**CHAT_ROW, "chosen": []}, "empty completions", "chosen has no token of its own"),
    ],
)
def test_an_unusable_row_is_refused_with_its_reason(row: Any, kind: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        tokenized(row, max_length=40)
    assert caught.value.kind == kind
    assert reason in caught.value.reason


def test_a_rows_variable_that_its_template_does_not_read_is_counted(tmp_path: Path) -> None:
    variables = [{"moood": 1, "x9": 1}, {"moood": 2, "mood": "sad"}, {"moood": None}, {}]
    pairs = pairs_of(tmp_path, [{**CHAT_ROW, "chat_template_kwargs": each} for each in variables])
    assert pairs.unread == pairs.sets[0].unread == {"moood (it reads mood)": 2, "x9": 1}
    moods = [{**CHAT_ROW, "chat_template_kwargs": {"mood": each.get("mood")}} for each in variables]
    assert [pairs.tokens(index).tolist() for index in range(4)] == [
        [*chain(*tokenized(row))] for row in moods
    ]


def test_a_pair_that_truncation_makes_alike_is_a_tie() -> None:
    with pytest.raises(BadRow) as caught:
        tokenized({"prompt": "p", "chosen": "same1", "rejected": "same2"}, max_length=5)
    assert caught.value.kind == "ties"


@pytest.mark.parametrize("key", ["system_prompt", "chat_template_kwargs"])
def test_what_acts_on_conversations_alone_is_refused_beside_text(key: str) -> None:
    with pytest.raises(BadRow, match=f"is plain text, which does not use data.{key}"):
        tokenized(TEXT_ROW, **{key: "Be kind." if key == "system_prompt" else {"mood": "glad"}})
    assert tokenized(
        {**TEXT_ROW, "tools": "no matter", "chat_template_kwargs": {"mood": 1}}
    ) == tokenized(TEXT_ROW)  # as in TRL


def test_a_setting_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"data.chat_template_kwargs.moood = False: is not read .*; did you mean mood\?",
    ):
        tokenized(CHAT_ROW, chat_template_kwargs={"moood": False})


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (
            None,
            UserError,
            "has no chat template, but the data are conversations; set data.chat_template",
        ),
        ({"rag": "{{ messages }}"}, UserError, "has no chat template that is the default"),
        (
            "{% for m in messages %}",
            UserError,
            r"model.tokenizer = .*is not Jinja: Unexpected end of template.*line 1",
        ),
        ("{{ raise_exception('No.') }}", BadRow, "the chat template rejects it: No."),
        ("{{ messages }}", BadRow, "has tools, not read by the chat template"),
    ],
)
def test_a_template_without_a_clear_completion_is_refused(
    template: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer(), "chat_template", template)
    with pytest.raises(error, match=message):
        tokenized(
            {**CHAT_ROW, "tools": [{"name": "f"}]} if "messages }" in str(template) else CHAT_ROW
        )
