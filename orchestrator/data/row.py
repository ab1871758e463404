"""A row of preference data: the columns that are read, and the error of an unusable row."""

from typing import Any, Literal

from orchestrator.settings.data import DataSpec

Row = dict[str, Any]
"""A row by column, as it was read, or with an explicit prompt."""

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
SHOWN_COLUMNS = 12
SHOWN_LETTERS = 40
# Setting of `data` that names the column of each number of a pair.
NUMERIC = {"weights": "weight_column", "margins": "margin_column"}


class BadRow(Exception):
    """A row that cannot be trained on.

    `kind` decides whether it is dropped, `reason` says what is wrong with it, and `cure`, if set,
    how to fix all rows of that kind.
    """

    def __init__(self, kind: DropReason, reason: str, cure: str = "") -> None:
        super().__init__(kind, reason, cure)
        self.kind, self.reason, self.cure = kind, reason, cure
        self.row: Any = None  # as it was read


def numeric_columns(data: DataSpec) -> tuple[str | None, ...]:
    """Return the columns that the settings name for the numbers of a pair."""
    return tuple(getattr(data, setting) for setting in NUMERIC.values())


def columns_of(row: Row) -> str:
    """Return the columns of a row as text of bounded length."""
    names = [repr(str(name)[:SHOWN_LETTERS]) for name in row]
    more = [f"and {len(names) - SHOWN_COLUMNS} more"] if len(names) > SHOWN_COLUMNS else []
    if not names:
        return "it has no columns"
    return f"its columns are {', '.join(names[:SHOWN_COLUMNS] + more)}"


def printable(text: str, keep: str = "") -> str:
    """Return a text with control characters (except those in `keep`) and invalid Unicode as
    escapes.
    """
    shown = (
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )
    return "".join(shown)
