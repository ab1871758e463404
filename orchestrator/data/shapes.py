"""Convert a row of any supported shape to prompt, chosen and rejected, all text or all messages."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from orchestrator.settings.data import TEMPLATE_CALL, DataSpec

Row = dict[str, Any]
DropReason = Literal[
    "malformed rows", "ties", "empty completions", "prompts that fill data.max_length"
]

PAIR = ("prompt", "chosen", "rejected")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Columns that usually hold part of the prompt. Their text must not be dropped silently.
CONTEXT = (
    "system",
    "system_prompt",
    "instruction",
    "input",
    "question",
    "query",
    "history",
    "context",
    "messages",
    "conversation",
    "conversations",
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Setting of `data` that names the column of each number of a pair.
NUMERIC = {"weights": "weight_column", "margins": "margin_column"}
TEXT_PARTS = ("text", "input_text", "output_text")
# A list of messages as JSON or as Python's repr, as in CSV files.
MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{.*["'](role["']\s*:\s*["'](system|user|assistant)|from["']\s*:\s*["'](system|human|gpt))["']""",
    re.DOTALL,
)
SEVERAL_ANSWERS = re.compile(
    r"(response|answer|output|completion|generation)s?_?([0-9]+|[a-d])", re.IGNORECASE
)
SHOWN_COLUMNS = 12
SHOWN_LETTERS = 40

# Notes on usable rows, counted over all rows; printed as "rows that NOTE: N".
IMPLICIT = "have no prompt (the common start of chosen and rejected is used as prompt)"
NO_PROMPT = "have an empty prompt"
EMPTY = "have an empty chosen or rejected completion"
TWICE = "repeat the prompt at the start of chosen and rejected, so the sequence contains it twice"
NULLS = "have null values in tools, which are removed (tools written as JSON text keep them)"


class BadRow(Exception):
    """A row that cannot be trained on.

    `kind` decides whether it is dropped, `reason` says what is wrong with it, and `cure`, if set,
    how to fix all rows of that kind.
    """

    def __init__(self, kind: DropReason, reason: str, cure: str = "") -> None:
        super().__init__(kind, reason, cure)
        self.kind, self.reason, self.cure = kind, reason, cure
        self.row: Any = None  # as it was read


class CheckedRow(NamedTuple):
    """A row with an explicit prompt, and notes about it."""

    row: Row
    unread: tuple[str, ...]  # columns with a value that are not read
    notes: tuple[str, ...]


def checked(row: Any, data: DataSpec) -> CheckedRow:
    """Return the row with an explicit prompt, text or messages throughout.

    Nulls count as absent at any depth, because Arrow adds the keys of all objects to each. Needs no
    tokenizer.

    Raises:
        BadRow: the row has a wrong shape, or holds text that would not be trained on.
    """
    if not isinstance(row, Mapping):
        raise BadRow(
            "malformed rows",
            f"is of type {type(row).__name__}, not an object with chosen and rejected",
        )
    try:
        return _checked(dict(row), data)
    except RecursionError:
        raise BadRow("malformed rows", "is nested too deeply") from None


def _checked(row: Row, data: DataSpec) -> CheckedRow:
    _check_answers(row)
    _check_media(row, data)
    shaped = dict(row)
    for column in (*PAIR, *TEMPLATE_COLUMNS):
        if column in row:
            shaped[column] = without_nulls(row[column])
            _check_unicode(column, shaped[column])
    shaped = _with_prompt(
        {**shaped, **{column: _value_of(column, shaped.get(column)) for column in PAIR}}
    )
    is_chat = isinstance(shaped["prompt"], list)
    _check_context(row, shaped, data)
    if is_chat and not shaped["prompt"]:
        raise BadRow(
            "malformed rows",
            "has no prompt, and chosen and rejected do not start with a common message",
        )
    if is_chat:
        template_arguments(shaped, data)
    else:
        _check_text_settings(data)
    return CheckedRow(shaped, _unread(row, data, is_chat), _notes(row, shaped))


def numbers_of(row: Row, data: DataSpec) -> dict[str, float]:
    """Return weight and margin of a pair, if the settings name their columns, by the names of
    NUMERIC.

    Raises:
        BadRow: one is missing or is not a usable number.
    """
    numbers: dict[str, float] = {}
    for name, setting in NUMERIC.items():
        if (column := getattr(data, setting)) is None:
            continue
        if column not in row:
            raise BadRow(
                "malformed rows", f"has no column {column!r} (data.{setting}); {_columns_of(row)}"
            )
        value: Any = row[column]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not is_number
            or not abs(value) <= sys.float_info.max
            or (name == "weights" and value <= 0)
        ):
            rule = "a finite number" + " more than 0" * (name == "weights")
            raise BadRow("malformed rows", f"{column} is {value!r}, not {rule} (data.{setting})")
        numbers[name] = float(value)
    return numbers


def template_arguments(row: Row, data: DataSpec) -> Row:
    """Return the variables of the chat template: those of the settings, overridden by the row's
    tools and its own.

    Raises:
        BadRow: tools or chat_template_kwargs have a wrong type.
    """
    tools, own = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(
                "malformed rows", f"tools is not JSON ({getattr(error, 'msg', error)})"
            ) from None
        _check_unicode("tools", tools)
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise BadRow("malformed rows", "tools is neither a list of objects nor JSON of one")
    if not isinstance(own, Mapping):
        raise BadRow(
            "malformed rows", f"chat_template_kwargs is {type(own).__name__}, not an object"
        )
    if taken := own.keys() & set(TEMPLATE_CALL):
        raise BadRow(
            "malformed rows",
            f"chat_template_kwargs has {min(taken)!r}, which is not a template variable",
        )
    own = {key: value for key, value in {"tools": tools, **own}.items() if value is not None}
    return {"tools": None, **data.chat_template_kwargs, **own}


def without_nulls(value: Any) -> Any:
    """Return the value without the null entries of its objects, at any depth; a null in a list
    stays.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


# --- columns --------------------------------------------------------------------------------------


def _check_answers(row: Row) -> None:
    for column in ("chosen", "rejected"):
        if column not in row:
            raise _unknown_columns(row, column)
        if row[column] is None:
            raise BadRow("malformed rows", f"{column} is null")


def _unknown_columns(row: Row, missing: str) -> BadRow:
    """Return the error for a row without the column `missing`; it names the shape if it is a known
    one.
    """
    rename = "" if row.keys() & set(PAIR) else "rename its columns to prompt, chosen and rejected"
    what, cure = _foreign_shape(row) or ("", rename)
    return BadRow(
        "malformed rows",
        f"has no column {missing!r}; {_columns_of(row)}{what and f': {what}'}",
        cure,
    )


def _foreign_shape(row: Row) -> tuple[str, str] | None:
    """Return (name, conversion) of the known format of a row without chosen or rejected, or
    None.
    """
    columns = row.keys()
    if {"completion", "label"} <= columns:
        return (
            "unpaired answers (KTO)",
            "write a good and a bad completion of one prompt as chosen and rejected",
        )
    if {"preferred_output", "non_preferred_output"} <= columns:
        pair = "preferred_output as chosen, non_preferred_output as rejected"
        return "OpenAI's preference format", f"write input.messages as prompt, {pair}"
    if {"human_ref_A", "human_ref_B"} <= columns:
        return (
            "SHP",
            "write history as prompt, the answer that labels prefers (1: A) as chosen, the other "
            "as rejected",
        )
    is_one = columns & {"messages", "conversations", "completion", "text"} and not columns & {
        "chosen",
        "rejected",
    }
    if is_one and not _similar(row):
        return "one answer, not a pair", "use pairs: prompt, chosen and rejected"
    if len(row) == 1 and _is_list_of(next(iter(row.values())), Mapping):
        name = next(iter(columns))
        return f"one object that wraps rows under {name!r}", f"write only the list under {name!r}"
    if len(row) > 1 and all(_is_list_of(value, str | list) for value in row.values()):
        return "an object of columns", "write one object per row"
    if _has_several_answers(row):
        return (
            "several answers, perhaps with scores",
            "write a better one of them as chosen and a worse one as rejected",
        )
    if similar := _similar(row):
        return "", f"rename {' and '.join(f'{old!r} to {new!r}' for new, old in similar.items())}"
    return None


def _has_several_answers(row: Row) -> bool:
    """Return whether the row has a list of answers, or numbered columns of them."""
    lists = [value for name, value in row.items() if name not in (*CONTEXT, *PAIR)]
    numbered = [name for name in row if SEVERAL_ANSWERS.fullmatch(str(name))]
    return len(numbered) > 1 or any(
        _is_list_of(value, str | Mapping) and len(value) > 1 for value in lists
    )


def _similar(row: Row) -> dict[str, str]:
    """Return columns with similar names, by the name that they should have."""
    stems = {"prompt": "prompt", "chosen": "chosen", "rejected": "reject"}
    found = {
        name: [
            each
            for each in map(str, row)
            if stem in each.lower() and isinstance(row.get(each), str | list)
        ]
        for name, stem in stems.items()
        if name not in row
    }
    return {name: columns[0] for name, columns in found.items() if len(columns) == 1}


def _is_list_of(value: Any, kinds: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, kinds) for each in value)
    )


def _check_media(row: Row, data: DataSpec) -> None:
    for column in MEDIA:
        if not _is_blank(row.get(column)) and column not in data.ignore_columns:
            cure = f"remove such rows, or set data.ignore_columns=[{column}] to train without it"
            raise BadRow("malformed rows", f"has {column}, but only text is supported", cure)


def _check_context(row: Row, shaped: Row, data: DataSpec) -> None:
    """Check that no other column holds part of the question that the prompt does not contain."""
    prompt = _squeezed("\n".join(_texts(shaped["prompt"])))
    known = (*PAIR, *TEMPLATE_COLUMNS, *_numeric(data), *data.ignore_columns)
    is_bare = row.get("prompt") is None and not prompt
    columns = [column for column in row if column not in known]
    suspects = [
        column for column in columns if column in CONTEXT or (is_bare and _is_sentence(row[column]))
    ]
    lost = [
        column
        for column in suspects
        if any(_squeezed(text) not in prompt for text in _asked(row[column]))
    ]
    if not lost:
        return
    names, settings = ", ".join(map(repr, map(str, lost))), ", ".join(map(str, lost))
    reason = f"has {names} besides prompt, which does not contain its text; it would be ignored"
    if row.get("prompt") is None:
        reason = (
            f"has no prompt, and {names}, which could be part of it, would be ignored; "
            f"{_columns_of(row)}"
        )
    cure = f"move the text into prompt, or set data.ignore_columns=[{settings}] to train without it"
    raise BadRow("malformed rows", reason, cure)


def _numeric(data: DataSpec) -> tuple[str | None, ...]:
    return tuple(getattr(data, setting) for setting in NUMERIC.values())


def _is_sentence(value: Any) -> bool:
    """Return whether a value of an unknown column could be a prompt: text of several words, or
    messages.
    """
    return (isinstance(value, str) and len(value.split()) > 1) or _is_list_of(value, Mapping)


def _asked(value: Any) -> Iterator[str]:
    """Yield the texts of a value; for messages, those that are not from the assistant."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("role", value.get("from")) not in ("assistant", "gpt", "model"):
            names = [name for name in value if name not in ("role", "from", "type")]
            for name in names:
                yield from _asked(value[name])
    elif isinstance(value, list):
        for each in value:
            yield from _asked(each)


def _texts(value: Any) -> Iterator[str]:
    """Yield the text itself, or the contents of messages."""
    yield from (
        [value]
        if isinstance(value, str)
        else (str(message.get("content", "")) for message in value)
    )


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _is_blank(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {}


def _unread(row: Row, data: DataSpec, is_chat: bool) -> tuple[str, ...]:
    """Return the columns with a value that are not read."""
    read = {*PAIR, *_numeric(data), *(TEMPLATE_COLUMNS if is_chat else ())}
    return tuple(
        str(column) for column, value in row.items() if column not in read and not _is_blank(value)
    )


def _columns_of(row: Row) -> str:
    """Return the columns of a row as text of bounded length."""
    names = [repr(str(name)[:SHOWN_LETTERS]) for name in row]
    more = [f"and {len(names) - SHOWN_COLUMNS} more"] if len(names) > SHOWN_COLUMNS else []
    return (
        f"its columns are {', '.join(names[:SHOWN_COLUMNS] + more)}"
        if names
        else "it has no columns"
    )


# --- values ---------------------------------------------------------------------------------------


def _value_of(column: str, value: Any) -> Any:
    """Return the value as text, or as a list of messages with text contents; None for an absent
    prompt.
    """
    if value is None or (isinstance(value, str) and not MESSAGES_AS_TEXT.match(value)):
        return value
    if isinstance(value, str):
        reason, cure = (
            f"{column} is a list of messages as text",
            "write it as a list, in JSONL or Parquet",
        )
        raise BadRow("malformed rows", reason, cure)
    if isinstance(value, Mapping):
        value = [value]  # one message
    if not isinstance(value, list):
        raise BadRow(
            "malformed rows",
            f"{column} is {type(value).__name__}, neither text nor a list of messages",
        )
    if column == "prompt" and not value:
        raise BadRow("malformed rows", "prompt is an empty list of messages")
    return [
        _message(f"message {number} of {column}", message)
        for number, message in enumerate(value, 1)
    ]


def _message(name: str, message: Any) -> Row:
    if not isinstance(message, Mapping):
        raise BadRow(
            "malformed rows",
            f"{name} is {type(message).__name__}, not an object with role and content",
        )
    if "role" not in message and {"from", "value"} <= message.keys():
        cure = "write role and content (human: user, gpt: assistant), and conversations as prompt"
        raise BadRow(
            "malformed rows", f"{name} has from and value (ShareGPT), not role and content", cure
        )
    if not isinstance(message.get("role"), str):
        raise BadRow("malformed rows", f"{name} has no role")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(_text_part(name, part) for part in content)}
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        what = (
            "has no text in its content"
            if content is None
            else f"has {type(content).__name__} as content, not text"
        )
        raise BadRow("malformed rows", f"{name} {what}")
    return dict(message)


def _text_part(name: str, part: Any) -> str:
    """Return the text of one part of a message's content."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if (
        not isinstance(part, Mapping)
        or kind not in TEXT_PARTS
        or not isinstance(part.get("text"), str)
    ):
        raise BadRow(
            "malformed rows",
            f"{name} has a part of type {kind!r} in its content: only text parts are supported",
        )
    return part["text"]


def _check_unicode(column: str, value: Any) -> None:
    """Check that text can be encoded as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"{value[error.start]!r} at character {error.start + 1}"
            rule = f"{column} is not Unicode text: {what} is a lone surrogate"
            raise BadRow("malformed rows", rule) from None
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            _check_unicode(column, name)
            _check_unicode(column, entry)
    elif isinstance(value, list):
        for entry in value:
            _check_unicode(column, entry)


def _check_text_settings(data: DataSpec) -> None:
    for key in ("system_prompt", "chat_template_kwargs"):
        if getattr(data, key):
            raise BadRow(
                "malformed rows",
                f"is plain text, which does not use data.{key}",
                f"remove data.{key}",
            )


# --- prompt and answers ---------------------------------------------------------------------------


def _with_prompt(row: Row) -> Row:
    """Return the row with prompt, chosen and rejected all text or all messages."""
    prompt, chosen, rejected = (row[column] for column in PAIR)
    if type(chosen) is not type(rejected):
        kinds = {
            column: "text" if isinstance(row[column], str) else "messages"
            for column in ("chosen", "rejected")
        }
        described = ", ".join(f"{column} is {kind}" for column, kind in kinds.items())
        raise BadRow("malformed rows", f"mixes text and messages: {described}")
    if prompt is None:
        return _with_implicit_prompt(row)
    if isinstance(chosen, str):
        if isinstance(prompt, str):
            return row
        return {
            **row,
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
    if isinstance(prompt, list):
        return _without_repeated_prompt(row)
    if all(side and side[0]["role"] == "assistant" for side in (chosen, rejected)):
        return {**row, "prompt": [{"role": "user", "content": prompt}]}
    whole = _with_implicit_prompt(row)
    questions = [
        message.get("content", "") for message in whole["prompt"] if message["role"] == "user"
    ]
    if prompt.strip() not in [question.strip() for question in questions]:
        reason = (
            "prompt is text, but chosen and rejected are conversations that do not both "
            "start with it"
        )
        raise BadRow(
            "malformed rows", reason, "remove the prompt column, or the messages before the answers"
        )
    return whole


def _without_repeated_prompt(row: Row) -> Row:
    """Remove the prompt from answers that both repeat it whole; raise BadRow if they repeat part of
    it.
    """
    prompt, sides = row["prompt"], {side: row[side] for side in ("chosen", "rejected")}
    if all(len(side) > len(prompt) and side[: len(prompt)] == prompt for side in sides.values()):
        return {**row, **{name: side[len(prompt) :] for name, side in sides.items()}}
    for name, side in sides.items():
        for message in takewhile(lambda each: each["role"] != "assistant", side):
            if message["role"] == "system" or message in prompt:
                reason = (
                    f"{name} starts with a {message['role']} message, like prompt: it would "
                    "be repeated"
                )
                raise BadRow(
                    "malformed rows",
                    reason,
                    "remove the prompt column, or the messages before the answers",
                )
    return row


def _with_implicit_prompt(row: Row) -> Row:
    """Return the row with the common prefix of chosen and rejected as prompt, as TRL's
    extract_prompt does.

    If one side is a prefix of the other, the last common element stays in the completions, as in
    TRL.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    shorter = min(len(chosen), len(rejected))
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    if cut and chosen[cut] != rejected[cut] and chosen[cut - 1] == " ":
        cut -= 1  # a space belongs to the word that follows it
    return {**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _notes(row: Row, shaped: Row) -> tuple[str, ...]:
    prompt, sides = shaped["prompt"], (shaped["chosen"], shaped["rejected"])
    is_text = isinstance(prompt, str)
    empty = (side == "" if is_text else _is_empty_answer(side) for side in sides)
    found = {
        IMPLICIT: row.get("prompt") is None,
        NO_PROMPT: is_text and not prompt,
        EMPTY: any(empty),
        # an answer may start with a word or two of the prompt
        TWICE: is_text
        and len(prompt.split()) > 2
        and all(side.startswith(prompt) for side in sides),
        NULLS: _has_null(row.get("tools")),
    }
    return tuple(note for note, is_so in found.items() if is_so)


def _is_empty_answer(messages: list[Row]) -> bool:
    return bool(messages) and not any(
        message.get("content") or message.get("tool_calls") for message in messages
    )


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(entry is None or _has_null(entry) for entry in value.values())
    return isinstance(value, list) and any(map(_has_null, value))


def note_lines(unread: Mapping[str, int], notes: Mapping[str, int]) -> Iterator[str]:
    """Yield lines about the rows of a set: columns that are not read, and each note with its
    count.
    """
    if unread:
        yield f"columns not read: {', '.join(printable(column) for column in unread)}"
    for note, rows in notes.items():
        yield f"rows that {note}: {rows}"


def printable(text: str, keep: str = "") -> str:
    """Return a text with control characters (except those in `keep`) and invalid Unicode as
    escapes.
    """
    shown = (
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )
    return "".join(shown)
