"""Generate docs/settings.md, a Markdown page of all settings.

python -m orchestrator.settings.markdown > docs/settings.md
"""

import json
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from orchestrator.settings.base import FREE, Block
from orchestrator.settings.catalogue import block_of
from orchestrator.settings.run import RunSpec

INTRODUCTION = """\
# Settings

Every setting of a run, generated from [orchestrator/settings](../orchestrator/settings) by
`python -m orchestrator.settings.markdown > docs/settings.md`; `orchestrator help settings` prints
the same list.
Write a setting in its block (`optimizer: {lr: 5e-7}`) or as an override (`optimizer.lr=5e-7`).

The last column says whether a setting may change when the run is resumed.
"""
TABLE = ("| setting | values | default | | on resume |", "|---|---|---|---|---|")
VALUES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true, false",
    list: "list",
}


def page() -> str:
    """Return the text of the page."""
    return "\n".join([INTRODUCTION, *_tables("", RunSpec, free=False)]) + "\n"


def _tables(name: str, block: type[Block], free: bool) -> Iterator[str]:
    """Yield a table of the plain settings of a block, then a section for each block below it.

    free: whether every setting of the block may change on resume.
    """
    fields = [(f"{name}.{key}".lstrip("."), field) for key, field in block.model_fields.items()]
    if plain := [(dotted, field) for dotted, field in fields if not _is_section(field)]:
        yield from (*TABLE, *(_row(dotted, field, free) for dotted, field in plain), "")
    for dotted, field in fields:
        if (inner := block_of(field)) is None:
            continue
        free_inside = free or field.json_schema_extra == FREE
        heading = "#" * (2 + dotted.count("."))
        if _is_section(field):
            yield from (f"{heading} {dotted}", "", _text(field), "")
            yield from _tables(dotted, inner, free_inside)
        else:
            keys = ("NAME", "N")[get_origin(field.annotation) is list]
            yield from (f"{heading} Entries of {dotted}", "")
            yield from _tables(f"{dotted}.{keys}", inner, free_inside)


def _is_section(field: FieldInfo) -> bool:
    """Return whether a field is a single block, which has its own table instead of a row."""
    return block_of(field) is not None and get_origin(field.annotation) not in (list, dict)


def _row(dotted: str, field: FieldInfo, free: bool) -> str:
    resume = "may change" if free or field.json_schema_extra == FREE else "fixed"
    return (
        f"| `{dotted}` | {_values(field.annotation)} | {_default(field)} | {_text(field)} | "
        f"{resume} |"
    )


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", r"\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "not set"
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default)}`"


def _values(annotation: Any) -> str:
    """Return a description of the values of a setting."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _values(arguments[0])
    if origin in (list, dict) or isinstance(annotation, type):
        return VALUES.get(origin or annotation, "mapping")
    return " or ".join(_values(each) for each in arguments if each is not NoneType)


if __name__ == "__main__":
    print(page(), end="")
