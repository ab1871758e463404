"""TRL's own collator, by name and in Python, feeds what our padded layout feeds."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.local.debug import debug
from support.run_files import losses
from support.tiny_settings import tiny_spec
from support.trl_trainer import need_trl

need_trl()

THEIRS = "trl.trainer.dpo_trainer:DataCollatorForPreference"
LIMIT = 40  # tokens; some pairs are longer
CUT = {"max_length": LIMIT, "truncation_mode": "keep_end"}


@pytest.mark.parametrize("cut", [{}, CUT], ids=["whole", "keep_end"])
def test_trls_collator_gives_the_losses_of_padded_batches(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], cut: dict[str, Any]
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data = {"max_length": LIMIT, "truncation": "keep_end"} if cut else {}
    ours = tiny_spec(tmp_path, run={"name": "ours"}, data=data, model={"attention": "padded"})
    debug(ours)
    assert "must truncate" not in capfd.readouterr().out
    named = tiny_spec(
        tmp_path, run={"name": "named"}, data={**data, "collator": {"path": THEIRS, "kwargs": cut}}
    )
    debug(named)
    if cut:
        assert f"{THEIRS} must truncate" in capfd.readouterr().out
    spec = tiny_spec(tmp_path, run={"name": "given"}, data=data)
    debug(spec, data_collator=DataCollatorForPreference(pad_token_id=0, **cut))
    assert losses(spec.run_dir) == losses(named.run_dir) == losses(ours.run_dir)
    assert len(losses(ours.run_dir)) == 4
