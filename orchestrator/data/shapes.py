"""Convert a row of any supported shape to prompt, chosen and rejected, all text or all messages."""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from orchestrator.data.columns import check_answers, check_context, check_media, unread_columns
from orchestrator.data.messages import check_unicode, text_or_messages, without_nulls
from orchestrator.data.row import (
    NUMERIC,
    PAIR,
    TEMPLATE_COLUMNS,
    BadRow,
    Row,
    columns_of,
    printable,
)
from orchestrator.settings.data import TEMPLATE_CALL, DataSpec

# Notes on usable rows, counted over all rows; printed as "rows that NOTE: N".
IMPLICIT = "have no prompt (the common start of chosen and rejected is used as prompt)"
NO_PROMPT = "have an empty prompt"
EMPTY = "have an empty chosen or rejected completion"
TWICE = "repeat the prompt at the start of chosen and rejected, so the sequence contains it twice"
NULLS = "have null values in tools, which are removed (tools written as JSON text keep them)"


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
        return _in_one_shape(dict(row), data)
    except RecursionError:
        raise BadRow("malformed rows", "is nested too deeply") from None


def _in_one_shape(row: Row, data: DataSpec) -> CheckedRow:
    check_answers(row)
    check_media(row, data)
    shaped = dict(row)
    for column in (*PAIR, *TEMPLATE_COLUMNS):
        if column in row:
            shaped[column] = without_nulls(row[column])
            check_unicode(column, shaped[column])
    shaped = _with_prompt(
        {**shaped, **{column: text_or_messages(column, shaped.get(column)) for column in PAIR}}
    )
    is_chat = isinstance(shaped["prompt"], list)
    check_context(row, shaped, data)
    if is_chat and not shaped["prompt"]:
        raise BadRow(
            "malformed rows",
            "has no prompt, and chosen and rejected do not start with a common message",
        )
    if is_chat:
        template_arguments(shaped, data)
    else:
        _check_text_settings(data)
    return CheckedRow(shaped, unread_columns(row, data, is_chat), _notes(row, shaped))


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
                "malformed rows", f"has no column {column!r} (data.{setting}); {columns_of(row)}"
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
        check_unicode("tools", tools)
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
    notes = {
        IMPLICIT: row.get("prompt") is None,
        NO_PROMPT: is_text and not prompt,
        EMPTY: any(empty),
        # an answer may start with a word or two of the prompt
        TWICE: is_text
        and len(prompt.split()) > 2
        and all(side.startswith(prompt) for side in sides),
        NULLS: _has_null(row.get("tools")),
    }
    return tuple(note for note, is_so in notes.items() if is_so)


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
