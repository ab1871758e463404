"""The block checkpoint: one setting decides how often to save."""

from pathlib import Path

import pytest

from orchestrator.settings.errors import UserError
from support.tiny_settings import tiny_spec


def test_an_automatic_interval_and_one_in_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tiny_spec(tmp_path, checkpoint={"every": "auto", "every_steps": 5})
    assert str(caught.value) == (
        "checkpoint.every = 'auto': cannot be combined with checkpoint.every_steps=5; "
        "remove one of them"
    )
