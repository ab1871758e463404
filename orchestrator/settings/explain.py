"""Translate pydantic's validation errors into UserErrors: one line per key, with a fix."""

from typing import Any

from pydantic import ValidationError

from orchestrator.settings.base import Block
from orchestrator.settings.catalogue import block_at, by_last_name, settings
from orchestrator.settings.errors import UserError
from orchestrator.settings.near import folded, nearest
from orchestrator.settings.other_names import NO_COUNTERPART, OTHER_NAMES, OTHER_VALUES
from orchestrator.settings.run import RunSpec
from orchestrator.settings.trl_names import NOT_NEEDED, TRL_NAMES

# Setting that is meant when a plain value replaces a whole block; the first that accepts the value.
MAIN_SETTINGS = {
    "run": ("name",),
    "model": ("path",),
    "model.init": ("model_type",),
    "model.lora": ("r", "adapter_path"),
    "data": ("train",),
    "dpo": ("beta", "loss_type"),
    "batch": ("global_batch_size",),
    "optimizer": ("lr", "name"),
    "scheduler": ("warmup_steps", "name"),
    "training": ("max_steps", "epochs"),
    "engine": ("zero_stage", "kind"),
    "reference": ("kind", "path"),
    "evaluation": ("every_steps", "metric_for_best"),
    "evaluation.early_stopping": ("patience",),
    "checkpoint": ("every_steps", "export"),
    "cluster": ("num_workers",),
    "slurm": ("workers_per_node", "partition"),
    "wandb": ("mode", "project"),
}

# Settings that may be any text, also digits, which YAML reads as a number.
FREE_TEXT = (
    "run.name",
    "wandb.project",
    "wandb.group",
    "slurm.partition",
    "slurm.account",
    "slurm.qos",
)


def explain(error: ValidationError) -> list[UserError]:
    """Return pydantic's validation errors as UserErrors, one per key."""
    return [_explain_one(details) for details in error.errors()]


def _explain_one(details: Any) -> UserError:
    location, kind, value = details["loc"], details["type"], details["input"]
    key = _dotted(location)
    block = block_at(location[:-1])
    field = block.model_fields.get(str(location[-1])) if block else None
    if kind == "extra_forbidden" and block:
        return UserError(key, value, "is not a setting", meant_by(location, block))
    if kind == "model_type" and (inner := block_at(location)):
        return _explain_block(location, value, inner)
    described = "`orchestrator help settings` describes it"
    if field and field.description:
        described = f"it is: {field.description}"
    if kind == "missing" or (value is None and field and field.is_required()):
        return UserError(key, None, "is required", described)
    setting = ".".join(part for part in location if isinstance(part, str))
    fix = _other_value(setting, value) or _fix_of_type(key, kind, value)
    if kind == "literal_error":
        allowed = details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        rule = f"must be one of {', '.join(allowed)}"
        return UserError(key, value, rule, fix or _allowed_value(value, allowed))
    default = None
    if field and not field.is_required():
        default = field.get_default(call_default_factory=True)
    if default not in (None, {}, []):
        described = f"for example {key}={default} ({described})"
    rule = details["msg"][0].lower() + details["msg"][1:]
    return UserError(key, value, rule, fix or described)


def meant_by(location: tuple[int | str, ...], block: type[Block] = RunSpec) -> str:
    """Return what was meant by the last name of a path, which is not a setting of `block`, as the
    fix of an error.
    """
    name, parent = folded(str(location[-1])), str(location[-2]) if len(location) > 1 else ""
    if answer := _name_elsewhere(name, parent):
        return answer
    if near := nearest(name, block.model_fields, cutoff=0.7):
        return f"did you mean {_dotted((*location[:-1], near))}?"
    if homes := by_last_name().get(name):
        return f"did you mean {' or '.join(homes[:3])}?"
    names = [*by_last_name(), *TRL_NAMES, *OTHER_NAMES]
    if (near := nearest(name, names, cutoff=0.85)) and (
        answer := _name_elsewhere(near, "") or _homes_of(near)
    ):
        return answer
    if block is RunSpec:
        return "`orchestrator help settings` lists all settings; for example optimizer.lr=1e-6"
    return "the keys here are " + ", ".join(block.model_fields)


def _name_elsewhere(name: str, parent: str) -> str | None:
    """Return the setting that another trainer's name corresponds to, or why there is none; None for
    unknown names.
    """
    for each in (f"{parent}.{name}", name):
        if each in TRL_NAMES or each in OTHER_NAMES:
            return f"did you mean {TRL_NAMES.get(each) or OTHER_NAMES[each]}?"
        if each in NOT_NEEDED or each in NO_COUNTERPART:
            return f"remove it: {NOT_NEEDED.get(each) or NO_COUNTERPART[each]}"
    return None


def _homes_of(name: str) -> str:
    return f"did you mean {' or '.join(by_last_name()[name][:3])}?"


def _explain_block(location: tuple[int | str, ...], value: Any, block: type[Block]) -> UserError:
    """Explain a plain value in the place of a block of settings."""
    key = _dotted(location)
    setting = ".".join(part for part in location if isinstance(part, str))
    if value in (None, ""):
        held = settings().get(setting)
        about = f"it is: {held.description}" if held else "remove it"
        where = setting if isinstance(location[-1], int) else key
        return UserError(where, None, "is empty", about)
    return UserError(
        key, value, "is a block of settings", _fix_of_block(key, setting, value, block)
    )


def _fix_of_block(key: str, setting: str, value: Any, block: type[Block]) -> str:
    """Return how to write what a plain value in the place of a block probably means."""
    main_settings = MAIN_SETTINGS.get(setting, ())
    for name in main_settings:
        if fix := _other_value(f"{setting}.{name}", value):
            return fix
    if isinstance(value, bool):
        return f"write {key}={{}} for its defaults, or remove it" if value else "remove it"
    for name in main_settings:
        if _accepts(block, name, value) or name == main_settings[-1]:
            return f"did you mean {key}.{name}={value}?"
    return "its keys are " + ", ".join(block.model_fields)


def _accepts(block: type[Block], name: str, value: Any) -> bool:
    """Return whether a setting of a block accepts a value, ignoring other required settings of the
    block.
    """
    try:
        block.model_validate({name: value})
    except UserError:
        return False
    except ValidationError as error:
        return all(details["loc"][:1] != (name,) for details in error.errors())
    return True


def _other_value(setting: str, value: Any) -> str | None:
    """Return the fix for a value, or the first entry of a list, that has another name here."""
    known = OTHER_VALUES.get(setting, {})
    entries = value if isinstance(value, list) else [value]
    return next((known[name] for name in map(folded, map(str, entries)) if name in known), None)


def _fix_of_type(key: str, kind: str, value: Any) -> str | None:
    """Return how to write a value of the wrong type."""
    if kind == "list_type" and isinstance(value, str):
        return f"for example {key}=[{value}]"
    if kind == "dict_type" and isinstance(value, str):
        return f"for example {key}={{name: {value}}}"
    if kind == "int_from_float" and 0 < value < 1 and "steps" in key:
        if "warmup" in key:
            return f"it is a number of steps; for a fraction set scheduler.warmup_ratio={value}"
        return f"it is a number of steps; for example {key}=100"
    if value is None and ":" in key.rpartition(".")[2]:
        return f"write a space after the colon: {{{key.rpartition('.')[2].replace(':', ': ')}}}"
    if kind == "run_name":
        return "for example run.name=llama-dpo"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "string_type" and key in FREE_TEXT and is_number:
        return f"YAML reads {value} as a number; quote it: \"{key}='{value}'\""
    return None


def _allowed_value(value: Any, allowed: list[str]) -> str:
    """Return the allowed value that was probably meant, as the fix of an error."""
    entries = value if isinstance(value, list) else [value]
    meant = next((str(entry) for entry in entries if entry not in allowed), "")
    near = nearest(meant, allowed)
    return f"did you mean {near}?" if near else f"set it to {allowed[0]}"


def _dotted(location: tuple[int | str, ...]) -> str:
    # a single evaluation set has the name ""
    return ".".join(str(part) for part in location if part != "")
