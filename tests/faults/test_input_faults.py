"""Nothing that a user can write into a row or a settings file ends in a traceback."""

import json
import os
import random
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from faults.conftest import FaultRow
from orchestrator.cli import main
from support.refusals import CHAT, GOOD
from support.tiny_settings import raw_settings

CASES, FAST = 150, 20  # of rows, and as many of settings; those in the default run
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
IMPLICIT = [{"chosen": f"a b {i}", "rejected": f"a c {i}"} for i in range(4)]
SHAPES = (GOOD, CHAT, IMPLICIT, [{**row, **TOOLS} for row in CHAT], [{**GOOD[0], "w": 1}])
# as text, since most are neither JSON nor Python values; the last ones are deep or large
HOSTILE_JSON = (
    (
        'null true 0 -1 1.5 NaN Infinity -Infinity 1e999 [] {} [[]] [null] [{}] [1] "" " " '
        '"\\ud800" "\\u0000" "\\ud83d\\ude00" {"role":"user"} [{"role":"user","content":null}] '
        '[{"role":1,"content":"a"}] [{"role":"user","content":[{"type":"image"}]}] {"\\udc80":1}'
    )
    .replace('" "', '"\\u00a0"')
    .split(" ")
)
HOSTILE_JSON += ["9" * 5000, "-" + "9" * 5000, "[" * 900 + "]" * 900, "[" * 10**5 + "]" * 10**5]
HOSTILE_YAML = re.split(  # a bar stands for a space
    r"\s+",
    r"""null ~ true 0 -1 1.5 .nan .inf -.inf 1e400 1e-400 0o777 0x1F 1_000 1:30 2020-01-01 [] {}
    [[]] [1] {a:1} "" "\0" "\ud800" '9' ??? ${} ${run.seed} ${nope:1} ${oc.env:HOME}
    ${oc.env:MISSING_X}
    !!binary|aGk= !!set|{a} !!timestamp|2020-01-01 !!python/object:os.system|{}
    !!python/object/apply:os.system|[x] !!python/name:os.system &a|[*a] *b {?|[1]|:|2} {1:|2} <<""",
)
HOSTILE_YAML += [str(10**23), "9" * 5000, "0x" + "f" * 5000, "[" * 10**5 + "]" * 10**5, "x" * 10**5]


def mutated_rows(seed: int) -> bytes:
    """The rows of a JSON file, one of which is wrong in one place, or bytes of which are."""
    draw = random.Random(seed)
    rows = [json.dumps(row) for row in SHAPES[seed % len(SHAPES)]]
    row: Any = json.loads(rows[place := draw.randrange(len(rows))])
    holder, key = draw.choice(list(_places(row)))
    match draw.randrange(5):
        case 0 | 1 | 2:
            holder[key] = "@"
            rows[place] = json.dumps(row).replace('"@"', draw.choice(HOSTILE_JSON))
        case 3:
            del holder[key]
            rows[place] = json.dumps(row)
        case _:
            return _mutated_bytes("\n".join(rows).encode(), draw)
    if draw.random() < 0.3:
        return f"[{','.join(rows)}]".encode("utf-8", "surrogatepass")
    return "\n".join(rows).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested lists and dicts."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _mutated_bytes(text: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(text))
    return (
        text[:at],
        text[:at] + bytes([draw.randrange(256)]) + text[at:],
        text[:at] + text[at + 1 :],
        b"\xef\xbb\xbf" + text,
        text.decode().encode("utf-16"),
        text[:at] + b"\0" * 8 + text[at:],
        text[:at] + text[at : at + 40] + text[at:],
    )[draw.randrange(7)]


def mutated_settings(seed: int, raw: dict[str, Any]) -> bytes:
    """Settings of which one value is wrong, or bytes of which are."""
    draw = random.Random(seed)
    holder, key = draw.choice(list(_places(raw)))
    if draw.randrange(4) == 0:
        return _mutated_bytes(json.dumps(raw, indent=1).encode(), draw)
    holder[key] = "@"
    return json.dumps(raw).replace('"@"', draw.choice(HOSTILE_YAML).replace("|", " ")).encode()


def _outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command; check that it succeeds, or refuses its input in one line (of settings: one a
    key).
    """
    code = main(words)
    stderr = capsys.readouterr().err
    assert code in (0, 2), (code, stderr)
    if code == 2:
        first, *others = stderr.splitlines()
        assert first.startswith("error: ") != bool(others), stderr
    return "refused in one line" if code else "used"


def _samples() -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(i, marks=slow if i >= FAST else ()) for i in range(CASES)]


@pytest.mark.parametrize("seed", _samples())
def test_mutated_rows(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault_row: FaultRow
) -> None:
    raw = raw_settings(tmp_path)
    if seed % len(SHAPES) == len(SHAPES) - 1:
        raw["data"]["weight_column"] = "w"
    (tmp_path / "train.jsonl").write_bytes(mutated_rows(seed))
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    outcome = _outcome(["plan", str(tmp_path / "run.yaml"), "--show-rows", "9"], capsys)
    fault_row("mutated input", "a row", outcome)


@pytest.mark.parametrize("seed", _samples())
def test_mutated_settings(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault_row: FaultRow
) -> None:
    text = mutated_settings(seed, raw_settings(tmp_path, optimizer={"kwargs": {"eps": 1e-8}}))
    (tmp_path / "run.yaml").write_bytes(text)
    outcome = _outcome(["plan", str(tmp_path / "run.yaml")], capsys)
    fault_row("mutated input", "settings", outcome)


@pytest.mark.parametrize("value", HOSTILE_YAML, ids=lambda value: value[:20])
def test_values_of_the_command_line(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(raw_settings(tmp_path)))
    text = value.replace("|", " ")
    for key in ("run.seed", "run.name", "data.chat_template_kwargs.a"):
        _outcome(
            ["plan", str(tmp_path / "run.yaml"), f"{key}={text}", "data.train=nothing"], capsys
        )


@contextmanager
def _special_file(kind: str, path: Path) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            bound.bind(str(path))
        elif kind == "folder":
            path.mkdir()
        elif kind == "circle of links":
            path.symlink_to(path.name)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "inside a file":
            path.write_text("")
            path /= "file"
        elif kind == "too long":
            path = path.with_name("a" * 300 + path.name)
        elif kind == "NUL":
            path = path.with_name(f"a\0{path.name}")
        yield path


SPECIAL = ("pipe", "socket", "folder", "circle of links", "device")
SPECIAL += ("inside a file", "too long", "NUL")
PATHS = {
    "data.train": "rows.jsonl",
    "data.eval": "rows.parquet",
    "data.chat_template": "template.jinja",
    "data.cache_dir": "cache",
    "engine.deepspeed_config": "ds.json",
    "model.path": "model",
    "model.tokenizer": "tokenizer",
    "reference.path": "reference",
    "run.dir": "runs2",
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("key", [*PATHS, "settings file"])
def test_special_files_are_refused_with_the_key(
    key: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault_row: FaultRow
) -> None:
    raw = raw_settings(tmp_path)
    if key == "model.path":
        raw["model"] = {}
    with _special_file(kind, tmp_path / PATHS.get(key, "other.yaml")) as path:
        words = ["debug", str(tmp_path / "run.yaml")]
        if key == "settings file":
            words[1] = str(path)
        else:
            block, _, name = key.partition(".")
            raw.setdefault(block, {})[name] = str(path)
        (tmp_path / "run.yaml").write_text(json.dumps(raw))
        if kind == "folder" and key in ("data.cache_dir", "run.dir"):
            return  # as it should be
        code = main(words)
    stderr = capsys.readouterr().err
    assert code == 2, (code, stderr)
    (line,) = stderr.splitlines()
    assert line.startswith((f"error: {key}", "error: FILE")), line
    fault_row("path", f"{key} is {kind}", "refused with the key")
