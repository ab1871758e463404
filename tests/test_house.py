"""Rules of the house for orchestrator/: sizes, names, docstrings, imports and circles between its
modules."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from support.repository import ROOT

COLUMNS, PARAMETERS, FUNCTION_LINES, FILE_LINES = 100, 7, 60, 450
TABLES = {  # files that are one long table may have more lines
    "orchestrator/settings/other_names.py",
}
VAGUE_NAMES = {"made", "found", "given", "wanted", "said", "asked", "told"}
VAGUE_OPENING = re.compile(r"(What|Whether|How|Of|In which)\b")
# Files that import our own modules inside functions, and the heavy library that they put off.
DEFERRING: dict[str, str] = {
    "orchestrator/training/callbacks/build.py": "transformers' integrations, with every tracker",
    "orchestrator/cli.py": "torch, ray and pyarrow: each verb loads what it needs",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of orchestrator/, parsed once for all rules."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def module(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse("\n".join(self.lines))))

    @property
    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


FILES = [SourceFile(path) for path in sorted((ROOT / "orchestrator").rglob("*.py"))]
MODULES = {file.module for file in FILES}


def long_lines(file: SourceFile) -> Iterator[str]:
    for number, line in enumerate(file.lines, 1):
        if len(line) > COLUMNS:
            yield f"{file.name}:{number}: {len(line)} columns"


def long_file(file: SourceFile) -> Iterator[str]:
    if len(file.lines) > FILE_LINES:
        yield f"{file.name}: {len(file.lines)} lines"


def long_functions(file: SourceFile) -> Iterator[str]:
    for function in file.functions:
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{file.name}:{function.lineno}: {function.name} has {length} lines"


def many_parameters(file: SourceFile) -> Iterator[str]:
    for function in file.functions:
        names = [name for name in parameters(function) if name not in ("self", "cls")]
        if len(names) > PARAMETERS:
            yield f"{file.name}:{function.lineno}: {function.name} has {len(names)} parameters"


def vague_names(file: SourceFile) -> Iterator[str]:
    for node in file.nodes:
        for name in names_of(node):
            if name in VAGUE_NAMES:
                yield f"{file.name}:{getattr(node, 'lineno', 1)}: the name {name}"


def vague_docstrings(file: SourceFile) -> Iterator[str]:
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    for node in file.nodes:
        if isinstance(node, documented):
            docstring = ast.get_docstring(node) or ""
            if VAGUE_OPENING.match(docstring):
                line = getattr(node, "lineno", 1)
                yield f"{file.name}:{line}: a docstring opens with {docstring.split()[0]}"


def late_imports(file: SourceFile) -> Iterator[str]:
    for function in file.functions:
        for node in ast.walk(function):
            for module in imported_modules(node, file):
                yield f"{file.name}:{getattr(node, 'lineno', 1)}: {module} inside a function"


Rule = Callable[[SourceFile], Iterator[str]]
RULES: list[Rule] = [
    long_lines,
    long_file,
    long_functions,
    many_parameters,
    vague_names,
    vague_docstrings,
    late_imports,
]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return [argument.arg for argument in every]


def names_of(node: ast.AST) -> list[str]:
    """Return the names that a node defines or an attribute that it reads."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    return [node.attr] if isinstance(node, ast.Attribute) else []


def imported_modules(node: ast.AST, file: SourceFile) -> set[str]:
    """Return the modules of orchestrator that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in MODULES}
    if not isinstance(node, ast.ImportFrom):
        return set()
    base = node.module or ""
    if node.level:
        is_package = file.path.name == "__init__.py"
        package = file.module.split(".")[: None if is_package else -1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, base] if base else package)
    submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES
    others = any(f"{base}.{alias.name}" not in MODULES for alias in node.names)
    return submodules | ({base} & MODULES if others else set())


def import_graph() -> dict[str, set[str]]:
    """Return what each module imports, in functions and for type checking too."""
    return {
        file.module: {m for node in file.nodes for m in imported_modules(node, file)}
        for file in FILES
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (Tarjan's components of two or more)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(graph.get(module, ())):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = stack.index(module)
            component = sorted(stack[at:])
            del stack[at:]
            if len(component) > 1 or module in graph.get(module, ()):
                components.append(component)

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return components


def is_excepted(rule: Rule, file: SourceFile) -> bool:
    return (rule is late_imports and file.name in DEFERRING) or (
        rule is long_file and file.name in TABLES
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    offenders = [line for file in FILES if not is_excepted(rule, file) for line in rule(file)]
    assert offenders == [], "\n".join(offenders)


def test_every_exception_is_still_needed() -> None:
    offending = {(rule.__name__, file.name) for file in FILES for rule in RULES if any(rule(file))}
    excepted = {("long_file", name) for name in TABLES}
    excepted |= {("late_imports", name) for name in DEFERRING}
    assert excepted - offending == set()


def test_no_module_imports_itself_through_others() -> None:
    groups = [" <-> ".join(group) for group in circles(import_graph())]
    assert groups == [], "\n".join(groups)


BREAKS_EVERY_RULE = '''"""What this file is."""
def f(a, b, c, d, e, f, g, h):
    from orchestrator.settings import load
    made = a.told
'''


def test_each_rule_reports_a_file_that_breaks_it() -> None:
    file = SourceFile(ROOT / "orchestrator" / "bad.py")
    too_many = ["    pass"] * FILE_LINES
    # in place of the cached property
    vars(file)["lines"] = [*BREAKS_EVERY_RULE.splitlines(), "    " + "x" * COLUMNS, *too_many]
    assert {rule.__name__: len(list(rule(file))) for rule in RULES} == {
        "long_lines": 1,
        "long_file": 1,
        "long_functions": 1,
        "many_parameters": 1,
        "vague_names": 2,
        "vague_docstrings": 1,
        "late_imports": 1,
    }


def test_circles_are_components_of_two_or_more() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}, "f": {"f"}}
    assert circles(graph) == [["a", "b", "c"], ["f"]]
