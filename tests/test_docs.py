"""README and docs/: links lead somewhere, examples load, commands parse, and the generated page is
up to date.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from orchestrator.arguments import parse
from orchestrator.cli import LAUNCHERS
from orchestrator.data.sources import check_rows
from orchestrator.settings.errors import UserError
from orchestrator.settings.load import load_spec
from orchestrator.settings.loss import LOSS_TRAITS
from orchestrator.settings.markdown import page
from support.repository import ROOT
from support.tiny_settings import random_rows, tiny_spec, write_jsonl, write_settings

ROOT_PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PAGES = [*(ROOT / name for name in ROOT_PAGES), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```\n", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)#?([^)\s]*)\)")
PATH = re.compile(r"\b(?:configs|docs|launch|orchestrator|slurm|tests)/[\w/.-]*\w")
BASE = (
    "{run: {name: base}, model: {path: model}, data: {train: a.jsonl, eval: b.jsonl}, "
    "batch: {micro_batch_size: 1}}"
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str) -> list[Any]:
    """Return every block of code in that language, as parameters of a test."""
    content = ((path, *block) for path in PAGES for block in BLOCK.findall(path.read_text()))
    return [pytest.param(text, id=named(path)) for path, kind, text in content if kind == language]


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_to_a_file_and_a_heading(path: Path) -> None:
    for place, anchor in LINK.findall(BLOCK.sub("", path.read_text())):
        if place.startswith("https://"):
            continue
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), f"{place}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_files_that_a_page_names_exist(path: Path) -> None:
    for name in PATH.findall(path.read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "orchestrator")), name


def test_every_page_is_in_the_index() -> None:
    index = {place for place, _ in LINK.findall((ROOT / "docs/README.md").read_text())}
    assert index >= {path.name for path in PAGES if path.parent.name == "docs"} - {"README.md"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_settings_page_is_up_to_date() -> None:
    committed = (ROOT / "docs/settings.md").read_text()
    assert committed == page(), "run: python -m orchestrator.settings.markdown > docs/settings.md"


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_examples_load(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-template.jinja").write_text("{{ messages }}")
    (tmp_path / "base.yaml").write_text(BASE)
    for document in re.split(r"^---$", text, flags=re.MULTILINE):
        (tmp_path / "example.yaml").write_text(document)
        files = (
            ["example.yaml"]
            if re.search(r"^run:", document, re.MULTILINE)
            else ["base.yaml", "example.yaml"]
        )
        load_spec(files, ["data.eval=null"] if "eval_fraction" in document else [])


@pytest.mark.parametrize("text", blocks("bash"))
def test_orchestrator_commands_parse(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["orchestrator"]:
            assert parse(words[1:], tuple(LAUNCHERS)).verb == words[1]


def test_errors_are_shown_as_they_are_printed(tmp_path: Path) -> None:
    shown = " ".join((ROOT / "docs/get-started.md").read_text().split())
    with pytest.raises(UserError) as setting:
        load_spec(write_settings(tmp_path), ["batch.global_batch_sze=4"])
    assert f"error: {setting.value}" in shown
    assert f"error: {setting.value}" in (ROOT / "README.md").read_text()

    pairs = write_jsonl(
        tmp_path / "pairs.jsonl", [*random_rows(16), {"prompt": "a", "chosen": "b"}]
    )
    with pytest.raises(UserError) as row:
        check_rows(tiny_spec(tmp_path, data={"train": str(pairs)}).data, "train")
    assert f"error: {row.value}".replace(str(pairs), "/shared/data/train.jsonl") in shown


@pytest.mark.parametrize("loss", LOSS_TRAITS)
def test_the_page_of_losses_has_each_loss_and_its_own_settings(loss: str) -> None:
    lines = (ROOT / "docs" / "losses.md").read_text().splitlines()
    [row] = [line for line in lines if line.startswith("|") and f"`{loss}`" in line.split("|")[1]]
    assert [name for name in LOSS_TRAITS[loss].own_settings if f"`{name}`" not in row] == []
