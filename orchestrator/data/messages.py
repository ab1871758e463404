"""Read a value of a row as text or as a list of messages."""

import re
from collections.abc import Mapping
from typing import Any

from orchestrator.data.row import BadRow, Row

TEXT_PARTS = ("text", "input_text", "output_text")
# A list of messages as JSON or as Python's repr, as in CSV files.
MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{.*["'](role["']\s*:\s*["'](system|user|assistant)"""
    r"""|from["']\s*:\s*["'](system|human|gpt))["']""",
    re.DOTALL,
)


def without_nulls(value: Any) -> Any:
    """Return the value without the null entries of its objects, at any depth; a null in a list
    stays.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def text_or_messages(column: str, value: Any) -> Any:
    """Return the value as text, or as a list of messages with text contents; None for an absent
    prompt.
    """
    if value is None or (isinstance(value, str) and not MESSAGES_AS_TEXT.match(value)):
        return value
    if isinstance(value, str):
        reason = f"{column} is a list of messages as text"
        cure = "write it as a list, in JSONL or Parquet"
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
        what = f"has {type(content).__name__} as content, not text"
        if content is None:
            what = "has no text in its content"
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


def check_unicode(column: str, value: Any) -> None:
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
            check_unicode(column, name)
            check_unicode(column, entry)
    elif isinstance(value, list):
        for entry in value:
            check_unicode(column, entry)
