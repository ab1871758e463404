"""Check settings as YAML holds them, before they are validated: depth, text, numbers, secrets."""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from yaml import CollectionEndEvent, CollectionStartEvent

from orchestrator.settings.errors import UserError

LARGEST_BITS = 1023  # of an integer: a float holds no larger number
MOST_LEVELS = 100  # of nested YAML; libyaml's reader crashes at some 10,000
ENVIRONMENT = re.compile(r"(?<!\\)\$\{[^{}]*oc\.env\s*:([^},]*)")
SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
"""Names of environment variables that hold secrets."""
PATH_NAME = re.compile(r"(file|path|dir)$", re.IGNORECASE)


def check_levels(text: str) -> None:
    """Check that YAML is not nested too deeply, without building it.

    Raises:
        RecursionError: it is.
        YAMLError: it is not YAML.
    """
    level = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if level > MOST_LEVELS:
            raise RecursionError


def check_values(value: Any, key: str = "") -> None:
    """Check that every value can be written to config.yaml of the run, and read back as it is.

    Raises:
        UserError: one cannot.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_plain(key or "settings", name)
            check_values(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            check_values(entry, key)
    else:
        _check_plain(key or "settings", value)


def _check_plain(key: str, value: Any) -> None:
    """Check a value that holds no other ones."""
    if isinstance(value, str):
        if "\0" in value:
            raise UserError(key, value, "contains a NUL character", "remove it")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"{value[error.start]!r} at character {error.start + 1} is a lone surrogate"
            rule = f"is not Unicode text: {what}"
            raise UserError(key, value, rule, "write it as UTF-8 text") from None
    elif isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        rule = f"is an integer of {value.bit_length():,} bits; the limit is {LARGEST_BITS:,}"
        raise UserError(key, f"{value:#x}", rule, "use a smaller number")
    elif value is not None and not isinstance(value, int | float):
        rule = f"is of type {type(value).__name__}"
        raise UserError(key, value, rule, "write it as text, a number, a list or a block")


def check_environment(value: Any, path_keys: Sequence[str], key: str = "") -> None:
    """Check that settings refer to environment variables only in run.name and in paths, as
    config.yaml, trackers and messages show all settings in clear.

    Raises:
        UserError: another setting, or any setting with a variable whose name is that of a secret,
            would contain one.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            check_environment(entry, path_keys, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            check_environment(entry, path_keys, key)
    elif isinstance(value, str) and (variables := ENVIRONMENT.findall(value)):
        allowed = any(f"{key}.".startswith(f"{each}.") for each in ("run.name", *path_keys))
        if any(map(is_secret, variables)):
            rule = "names a secret, which would be written to config.yaml in clear"
            fix = "let the code that needs it read the environment variable"
            raise UserError(key, value, rule, fix)
        if not allowed:
            rule = "is an environment variable, which may be used only in run.name and in paths"
            raise UserError(key, value, rule, "write the value")


def is_secret(variable: str) -> bool:
    """Return whether an environment variable holds a secret by its name, not the path of one."""
    return bool(SECRET_NAME.search(variable)) and not PATH_NAME.search(variable.strip())
