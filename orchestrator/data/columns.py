"""Check the columns of a row: chosen and rejected are there, and no text outside them is lost."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.data.row import (
    CONTEXT,
    PAIR,
    TEMPLATE_COLUMNS,
    BadRow,
    Row,
    columns_of,
    numeric_columns,
)
from orchestrator.settings.data import DataSpec

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
SEVERAL_ANSWERS = re.compile(
    r"(response|answer|output|completion|generation)s?_?([0-9]+|[a-d])", re.IGNORECASE
)


def check_answers(row: Row) -> None:
    """Check that the row has chosen and rejected; the error names a known other format."""
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
        f"has no column {missing!r}; {columns_of(row)}{what and f': {what}'}",
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
    similar = {
        name: [
            each
            for each in map(str, row)
            if stem in each.lower() and isinstance(row.get(each), str | list)
        ]
        for name, stem in stems.items()
        if name not in row
    }
    return {name: columns[0] for name, columns in similar.items() if len(columns) == 1}


def _is_list_of(value: Any, kinds: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, kinds) for each in value)
    )


def check_media(row: Row, data: DataSpec) -> None:
    """Check that the row has text only."""
    for column in MEDIA:
        if not _is_blank(row.get(column)) and column not in data.ignore_columns:
            cure = f"remove such rows, or set data.ignore_columns=[{column}] to train without it"
            raise BadRow("malformed rows", f"has {column}, but only text is supported", cure)


def check_context(row: Row, shaped: Row, data: DataSpec) -> None:
    """Check that no other column holds part of the question that the prompt does not contain."""
    prompt = _squeezed("\n".join(_texts(shaped["prompt"])))
    known = (*PAIR, *TEMPLATE_COLUMNS, *numeric_columns(data), *data.ignore_columns)
    is_bare = row.get("prompt") is None and not prompt
    columns = [column for column in row if column not in known]
    suspects = [
        column for column in columns if column in CONTEXT or (is_bare and _is_sentence(row[column]))
    ]
    lost = [
        column
        for column in suspects
        if any(_squeezed(text) not in prompt for text in _texts_of_question(row[column]))
    ]
    if not lost:
        return
    names, settings = ", ".join(map(repr, map(str, lost))), ", ".join(map(str, lost))
    reason = f"has {names} besides prompt, which does not contain its text; it would be ignored"
    if row.get("prompt") is None:
        reason = (
            f"has no prompt, and {names}, which could be part of it, would be ignored; "
            f"{columns_of(row)}"
        )
    cure = f"move the text into prompt, or set data.ignore_columns=[{settings}] to train without it"
    raise BadRow("malformed rows", reason, cure)


def _is_sentence(value: Any) -> bool:
    """Return whether a value of an unknown column could be a prompt: text of several words, or
    messages.
    """
    return (isinstance(value, str) and len(value.split()) > 1) or _is_list_of(value, Mapping)


def _texts_of_question(value: Any) -> Iterator[str]:
    """Yield the texts of a value; for messages, those that are not from the assistant."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("role", value.get("from")) not in ("assistant", "gpt", "model"):
            names = [name for name in value if name not in ("role", "from", "type")]
            for name in names:
                yield from _texts_of_question(value[name])
    elif isinstance(value, list):
        for each in value:
            yield from _texts_of_question(each)


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


def unread_columns(row: Row, data: DataSpec, is_chat: bool) -> tuple[str, ...]:
    """Return the columns with a value that are not read."""
    read = {*PAIR, *numeric_columns(data), *(TEMPLATE_COLUMNS if is_chat else ())}
    return tuple(
        str(column) for column, value in row.items() if column not in read and not _is_blank(value)
    )
