"""Load YAML files and dotted overrides into a validated RunSpec, and save a RunSpec as YAML."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from orchestrator.durable import write_atomically
from orchestrator.settings.data import DATA_SUFFIXES, Split
from orchestrator.settings.errors import SettingsError, UserError, message_of
from orchestrator.settings.explain import explain
from orchestrator.settings.os_errors import os_errors
from orchestrator.settings.plain import (
    MOST_LEVELS,
    check_environment,
    check_levels,
    check_values,
)
from orchestrator.settings.run import RunSpec
from orchestrator.settings.wrong_file import (
    folder_error,
    missing_file,
    no_settings,
    unreadable_file,
)

RUN_CONFIG = "config.yaml"  # in a run directory: the settings of the run
FLATTEN = "flatten it: settings are at most a few levels deep"

# Settings that hold paths: of data, always local folders, and those that may be hub names instead.
DATA_KEYS: dict[str, Split] = {"data.train": "train", "data.eval": "eval"}
FOLDER_KEYS = ("run.dir", "data.cache_dir", "cluster.storage_path", "wandb.key_file")
MODEL_KEYS = ("model.path", "model.tokenizer", "model.lora.adapter_path", "reference.path")
PATH_KEYS = (*MODEL_KEYS, *DATA_KEYS)
ALL_PATH_KEYS = (*FOLDER_KEYS, *PATH_KEYS)
WITHOUT_OWNER = ("ctrl", "distilgpt2", "gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl", "openai-gpt")
"""Causal LMs that the hub still serves under old names without an owner."""


SettingsSource = str | Path | Mapping[str, Any]
"""A YAML file, or nested settings as YAML would hold them."""


def load_spec(
    files: Sequence[SettingsSource] | SettingsSource, overrides: Sequence[str] | str = ()
) -> RunSpec:
    """Merge YAML files or dicts from left to right, apply the `a.b=c` override(s), and validate the
    result.

    Relative paths are resolved from the current folder and become absolute: workers run elsewhere.

    Raises:
        UserError: a file is missing or not YAML, an override has no `=`, or a setting is wrong
            (SettingsError).
    """
    sources = [files] if isinstance(files, str | Path | Mapping) else list(files)
    names = (str(each) if isinstance(each, str | Path) else "a dict" for each in sources)
    shown = " ".join(names)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    try:
        merged = OmegaConf.merge(*map(_settings_of, sources), _dotlist(overrides))
        check_environment(OmegaConf.to_container(merged), ALL_PATH_KEYS)
        raw: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        rule = f"cannot be merged: {reason}"
        raise UserError("settings", shown, rule, "fix that key") from None
    except RecursionError:
        raise UserError("settings", shown, "are nested too deeply", FLATTEN) from None
    except TypeError:  # OmegaConf's error for this case
        rule = "cannot be merged: one has a list where a later file or override has a block"
        raise UserError("settings", shown, rule, "write a list there too") from None
    return make_spec(raw)


def make_spec(raw: dict[str, Any]) -> RunSpec:
    """Validate plain nested dicts; raise SettingsError with one line per wrong key."""
    check_values(raw)
    _make_paths_absolute(raw)
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(explain(error)) from None


def save_spec(spec: RunSpec, path: Path) -> None:
    """Write all settings, including defaults, so that the file documents what ran."""
    values = _escaped(spec.model_dump(mode="json"))
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(values)))


def saved_spec(path: Path) -> RunSpec | None:
    """Return the settings in a file of `save_spec`; None if it is missing, damaged or cut short."""
    with suppress(UserError):
        spec = load_spec(path)
        if RunSpec.model_fields.keys() <= _read(path).keys():
            return spec
    return None


def _escaped(value: Any) -> Any:
    """Escape what OmegaConf would treat as an interpolation, so that it is read back as text."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def paths_in(spec: RunSpec, keys: Iterable[str]) -> dict[str, str]:
    """Return {dotted key: path} for those keys that are set; keys of data sources are those of
    DataSpec.sources.
    """
    paths: dict[str, str] = {}
    for dotted in keys:
        if dotted in DATA_KEYS:
            sources = spec.data.sources(DATA_KEYS[dotted])
            paths |= {key: source.path for key, source in sources.items()}
            continue
        value: Any = spec
        for name in dotted.split("."):
            value = getattr(value, name, None)
        if isinstance(value, str):
            paths[dotted] = value
    return paths


def scheme_of(path: str) -> str:
    """Return the scheme of a URL such as s3://bucket/file; empty for a path or a hub name."""
    scheme, colon, _ = path.partition("://")
    return scheme.lower() if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else ""


def check_model_names(spec: RunSpec) -> None:
    """Check that each model and tokenizer is an existing folder or could be a hub name.

    Raises:
        UserError: a folder does not exist, or a hub name has no owner.
    """
    for key, name in paths_in(spec, MODEL_KEYS).items():
        if looks_local(name) and not os.path.isdir(name):
            raise UserError(key, name, "is not a folder", "use an existing folder or a hub name")
        if not looks_local(name) and "/" not in name and name not in WITHOUT_OWNER:
            rule = "is not a folder, and a hub name needs an owner (OWNER/NAME)"
            cure = f"use an existing folder (./{name}) or the full hub name"
            raise UserError(key, name, rule, cure)


def looks_local(source: str) -> bool:
    """Return whether a data or model setting is a path rather than a hub repository or a URL."""
    if scheme_of(source):
        return False
    return (
        source.startswith((".", "/", "~"))
        or source.endswith(DATA_SUFFIXES)
        or os.path.exists(source)
    )


def _settings_of(source: SettingsSource) -> DictConfig:
    return _read(Path(source)) if isinstance(source, str | Path) else OmegaConf.create(dict(source))


def _read(path: Path) -> DictConfig:
    """Read a settings file, or config.yaml of a run directory."""
    with os_errors({"settings file": str(path)}, "settings file"):
        path = _regular_file(path)
        if error := unreadable_file(path):
            raise error
        config = _parsed(path)
    plain = (
        OmegaConf.to_container(config) if isinstance(config, DictConfig | ListConfig) else config
    )
    if error := no_settings(path, plain):
        raise error
    # OmegaConf parses plain text as {text: None}; an empty file has no value at all
    if not isinstance(config, DictConfig) or all(value is None for value in config.values()):
        fix = "write blocks such as `run:` and `data:`"
        raise UserError("settings file", str(path), "has no top-level settings", fix)
    return config


def _regular_file(path: Path) -> Path:
    """Return the path of a settings file, or of config.yaml of a run directory."""
    if path.is_dir():
        if not (path / RUN_CONFIG).is_file():
            raise folder_error(path)
        path = path / RUN_CONFIG
    if path.exists() and not path.is_file():
        rule = "is not a regular file (a pipe, a socket or a device)"
        raise UserError("settings file", str(path), rule, "use a YAML file")
    if not path.is_file():
        raise missing_file(path)
    return path


def _parsed(path: Path) -> Any:
    try:
        with suppress(YAMLError):  # reported below, with the file and the line
            check_levels(path.read_text(encoding="utf-8"))
        return OmegaConf.load(path)
    except RecursionError:
        raise UserError("settings file", str(path), "is nested too deeply", FLATTEN) from None
    # ValueError: not UTF-8, no such date
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        rule = f"is not YAML: {message_of(error)}"
        raise UserError("settings file", str(path), rule, "fix that line") from None


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            rule, cure = "is not of the form key=value", "for example optimizer.lr=1e-6"
            raise UserError("override", override, rule, cure)
    try:
        for override in overrides:
            key, _, value = override.partition("=")
            check_levels(value)
            if key.count(".") + key.count("[") > MOST_LEVELS:
                raise RecursionError
        return OmegaConf.from_dotlist(list(overrides))
    except RecursionError:
        raise UserError("override", " ".join(overrides), "is nested too deeply", FLATTEN) from None
    # ValueError: not UTF-8, too long a number
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        rule = f"cannot be read: {message_of(error)}"
        raise UserError("override", " ".join(overrides), rule, "quote the value") from None


def _make_paths_absolute(raw: dict[str, Any]) -> None:
    for dotted in FOLDER_KEYS + PATH_KEYS:
        *blocks, key = dotted.split(".")
        block: Any = raw
        for name in blocks:
            block = block.get(name) if isinstance(block, dict) else None
        if dotted == "run.dir" and isinstance(block, dict):
            block.setdefault("dir", "runs")
        if isinstance(block, dict) and key in block:
            if dotted not in DATA_KEYS:
                _check_scheme(dotted, block[key])
            block[key] = _absolute(block[key], is_ours=dotted in FOLDER_KEYS)


def _check_scheme(key: str, value: Any) -> None:
    """Check that a setting that needs a folder is not a URL, which would become a folder named
    after the scheme.

    Raises:
        UserError: the setting is a URL.
    """
    if not isinstance(value, str) or not (scheme := scheme_of(value)):
        return
    if scheme == "file":
        fix = f"remove file://: {value.removeprefix('file://')}"
    elif key in FOLDER_KEYS:
        fix = "use a folder that every node can write, and copy it from there"
    else:
        is_hub = "hf" in scheme or "huggingface" in value
        fix = "use the hub name, OWNER/NAME" if is_hub else "use a folder"
    raise UserError(key, value, f"{scheme}:// is not supported", fix)


def _absolute(value: Any, is_ours: bool) -> Any:
    """Return a setting with absolute paths; it is a path, a block with one, or a list or dict of
    these.
    """
    if isinstance(value, list):
        return [_absolute(entry, is_ours) for entry in value]
    if isinstance(value, dict):
        names = ["path"] if "path" in value else list(value)
        return {**value, **{name: _absolute(value[name], is_ours) for name in names}}
    if isinstance(value, str) and (is_ours or looks_local(value)):
        return os.path.abspath(os.path.expanduser(value))
    return value
