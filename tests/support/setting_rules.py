"""Check the line with which a rule between settings refuses them."""

from orchestrator.settings.errors import UserError


def assert_rule(error: UserError, key: str, words: list[str]) -> None:
    """Check that an error has its key, a fix, and these words in one line."""
    assert error.key == key
    assert str(error).startswith(f"{key} = ")
    assert "\n" not in str(error)
    assert error.cure
    for word in words:
        assert word in str(error)
