"""Code of a user's is found by module:attr, or refused in a line that says where it broke."""

from pathlib import Path

import pytest

from orchestrator.settings.errors import UserError
from orchestrator.user_code import source_hash, user_attribute


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import math\n1 / 0",
            r"raised ZeroDivisionError: division by zero \(broken_{}.py line 2; when imported\)",
        ),
        ("def f(:", r"raised SyntaxError: invalid syntax \(broken_{}.py, line 1\)"),
        ("import math\nmath.nothing", r"raised AttributeError: .*nothing.*line 2; when imported"),
    ],
    ids=["raises", "no_python", "lacks"],
)
def test_an_import_error_of_user_code_is_one_line(
    source: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    (tmp_path / f"broken_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message.format(name)):
        user_attribute("dpo.loss_type", f"broken_{name}:loss")


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("no_such_module:x", "cannot be imported"),
        ("orchestrator.data.collate:nothing", "has no nothing"),
    ],
)
def test_missing_user_code_is_refused(path: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        user_attribute("callbacks", path)
    assert caught.value.key == "callbacks"


def test_an_edit_of_the_file_changes_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "edited_later.py").write_text("def loss(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    before = source_hash("edited_later:loss")
    assert source_hash("edited_later:loss") == before
    file.write_text("def loss(): pass")
    assert source_hash("edited_later:loss") != before
