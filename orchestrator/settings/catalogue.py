"""List and describe all settings by their dotted names."""

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from orchestrator.settings.base import Block
from orchestrator.settings.near import folded
from orchestrator.settings.run import RunSpec


@cache
def settings() -> dict[str, FieldInfo]:
    """Return every setting and block by its dotted name; entries of lists and of named blocks are
    left out.
    """
    return dict(_below("", RunSpec))


@cache
def by_last_name() -> dict[str, list[str]]:
    """Return the dotted names of settings by their folded last part."""
    names: dict[str, list[str]] = {}
    for dotted in settings():
        names.setdefault(folded(dotted.rpartition(".")[2]), []).append(dotted)
    return names


def _below(prefix: str, block: type[Block]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in block.model_fields.items():
        yield prefix + name, field
        if (inner := block_of(field)) and not _is_container(field):
            yield from _below(f"{prefix}{name}.", inner)


def _is_container(field: FieldInfo) -> bool:
    return get_origin(field.annotation) in (list, dict)


def block_of(field: FieldInfo | None) -> type[Block] | None:
    """Return the block that a field holds (directly, in a list or by name), or None if it holds
    plain values.
    """
    kinds = _types_in(field.annotation) if field else ()
    return next((kind for kind in kinds if issubclass(kind, Block)), None)


def block_at(location: tuple[int | str, ...]) -> type[Block] | None:
    """Return the block that a path of keys leads to, or None."""
    block: type[Block] = RunSpec
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):  # an entry of a list of blocks
            continue
        field = block.model_fields.get(part)
        if field and get_origin(field.annotation) is dict:  # blocks by name
            next(parts, None)
        inner = block_of(field)
        if inner is None:
            return None
        block = inner
    return block


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "not set" if default is None else repr(default)


def described(name: str) -> list[str]:
    """Return lines with default and description of a setting or of all settings of a block; name ""
    means all.
    """
    lines: list[str] = []
    for dotted, field in settings().items():
        if name and dotted != name and not dotted.startswith(f"{name}."):
            continue
        text = " ".join((field.description or "").split())
        if block_of(field) and not _is_container(field):
            lines += ["", f"{dotted}: {text}"]
        else:
            lines.append(f"  {dotted} ({_default_of(field)})  {text}")
    return lines[1:] if lines and not lines[0] else lines
