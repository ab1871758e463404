"""Promises of the code as a whole: its layers, light settings, and a docstring for every public
name.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.repository import ROOT

SOURCES = sorted((ROOT / "orchestrator").rglob("*.py"))
HEAVY = {"torch", "ray", "transformers", "datasets", "wandb", "numpy", "deepspeed", "peft", "trl"}


def python(code: str) -> str:
    """Return the output of some code in a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """The functions and classes of a module that others may use."""
    for node in tree.body:
        is_one = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_one and not node.name.startswith("_"):
            yield node


def test_a_file_imports_only_what_stands_above_it() -> None:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    "module", ["orchestrator", "orchestrator.settings.load", "orchestrator.cli"]
)
def test_nothing_heavy_is_loaded_to_read_settings(module: str) -> None:
    loaded = json.loads(python(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))
    assert module in loaded
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in loaded)


def test_settings_are_loaded_in_half_a_second_of_cpu_time() -> None:
    code = (
        "import time; t = time.process_time(); import orchestrator.settings.load; "
        "print(time.process_time() - t)"
    )
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_the_public_names_are_there_lazily() -> None:
    code = (
        "import orchestrator as o, sys; o.load_spec, o.RunSpec, o.UserError; print('torch' in "
        "sys.modules)"
    )
    assert python(code) == "False\n"
    assert "has no attribute 'nothing'" in python(
        "import orchestrator\ntry: orchestrator.nothing\nexcept AttributeError as e: print(e)"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_every_public_name_in_it_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == []


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 30
    assert any(path.name == "trainer.py" for path in SOURCES)
