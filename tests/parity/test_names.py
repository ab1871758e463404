"""Every setting of TRL's is answered: it is one here, under some name, or one line says why it is
not needed.
"""

from dataclasses import fields
from pathlib import Path

import pytest

from orchestrator.settings.base import Block
from orchestrator.settings.trl_names import NOT_NEEDED, TRL_NAMES
from support.tiny_settings import refused
from support.trl_trainer import need_trl

need_trl()

from trl import DPOConfig, ModelConfig, ScriptArguments  # noqa: E402

NAMES = sorted(
    {field.name for config in (DPOConfig, ModelConfig, ScriptArguments) for field in fields(config)}
)
OURS = {name for block in Block.__subclasses__() for name in block.model_fields}


def test_every_setting_of_trl_has_an_answer() -> None:
    assert {name for name in NAMES if name not in TRL_NAMES and name not in NOT_NEEDED} == set()
    assert not TRL_NAMES.keys() & NOT_NEEDED.keys()
    assert NOT_NEEDED.keys() <= set(NAMES)  # no name that TRL has given up


@pytest.mark.parametrize("name", ["padding_free", "push_to_hub", "lora_dropout"])
def test_trl_settings_without_a_counterpart_are_refused_with_the_reason(
    tmp_path: Path, name: str
) -> None:
    error = refused(tmp_path, training={name: True})
    assert str(error) == f"training.{name} = True: is not a setting; remove it: {NOT_NEEDED[name]}"
