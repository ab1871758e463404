"""Rows of conversations, and the error for one."""

from typing import Any

import pytest

from orchestrator.data.row import BadRow
from orchestrator.data.shapes import checked
from support.tiny_parts import data_spec

Row = dict[str, Any]


def turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


SYSTEM, QUESTION, YES, NO = (
    turn("system", "Be kind."),
    turn("user", "Say it."),
    turn("assistant", "yes"),
    turn("assistant", "no"),
)


def refusal(row: Any, **settings: Any) -> BadRow:
    with pytest.raises(BadRow) as caught:
        checked(row, data_spec(**settings))
    assert caught.value.kind == "malformed rows"
    return caught.value
