"""What pydantic says of wrong settings -> errors of ours, one line for each key, with what was meant."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from orchestrator.settings.spec import Block, RunSpec, UserError
from orchestrator.settings.trl_names import NOT_NEEDED, RECIPES, TRL_NAMES


def explain(error: ValidationError) -> list[UserError]:
    """Pydantic's complaints as errors of ours, one per key, each with its rule and cure."""
    return [_explain_one(details) for details in error.errors()]


def _explain_one(details: Any) -> UserError:
    location, kind, value = details["loc"], details["type"], details["input"]
    key, name = _dotted(location), str(location[-1])
    block = _block_at(location[:-1])
    field = block.model_fields.get(name) if block else None
    if kind == "extra_forbidden" and block:
        return UserError(key, value, "is not a setting", _cure_of_unknown(block, location))
    if kind == "model_type" and (inner := _block_at(location)):
        return UserError(key, value, "is a block of settings", "its keys are " + ", ".join(inner.model_fields))
    described = f"it is: {field.description}" if field and field.description else "see orchestrator/settings/spec.py"
    if kind == "missing":
        return UserError(key, None, "is required", described)
    if kind == "literal_error":
        allowed = details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        meant = "disabled" if value is False and "disabled" in allowed else str(value)  # YAML reads off as false
        if isinstance(value, list):
            meant = next((str(entry) for entry in value if entry not in allowed), "")
        near = difflib.get_close_matches(meant, allowed, n=1)
        cure = f"did you mean {near[0]}?" if near else f"set it to {allowed[0]}"
        if name == "loss_type" and meant in RECIPES:
            cure = f"set {RECIPES[meant]}"
        return UserError(key, value, f"must be one of {', '.join(allowed)}", cure)
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    cure = f"for example {key}={default} ({described})" if default not in (None, {}, []) else described
    if key == "callbacks":
        cure = f"for example callbacks=[{value}]" if isinstance(value, str) else "give a list of module:attr"
    return UserError(key, value, details["msg"][0].lower() + details["msg"][1:], cure)


def _cure_of_unknown(block: type[Block], location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    if name in TRL_NAMES:
        return f"did you mean {TRL_NAMES[name]}?"
    if name in NOT_NEEDED:
        return f"remove it: {NOT_NEEDED[name]}"
    if near := difflib.get_close_matches(name, block.model_fields, n=1, cutoff=0.6):
        return f"did you mean {_dotted((*location[:-1], near[0]))}?"
    return "the keys here are " + ", ".join(block.model_fields)


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "")  # which a single evaluation set has as its name


def _block_at(location: tuple[int | str, ...]) -> type[Block] | None:
    """The block of settings that a path of keys leads to, if it leads to one."""
    block: type[Block] = RunSpec
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):  # an entry of a list of blocks
            continue
        field = block.model_fields.get(part)
        if field and get_origin(field.annotation) is dict:  # blocks by name
            next(parts, None)
        blocks = [kind for kind in _types_in(field.annotation) if issubclass(kind, Block)] if field else []
        if not blocks:
            return None
        block = blocks[0]
    return block


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)
