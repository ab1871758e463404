"""A process imports no library that its run does not need: each costs every rank seconds of CPU at
every start.
"""

import subprocess
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import trainer_utils

from orchestrator import callback_api
from support.tiny_settings import write_settings

NOT_NEEDED = ("peft", "bitsandbytes", "deepspeed", "ray", "wandb", "trl")
AFTER_RUN = f"""
import sys
from orchestrator import cli
code = cli.main(sys.argv[1:])
print("imported:", [name for name in {NOT_NEEDED} if name in sys.modules])
sys.exit(code)
"""


def test_a_run_imports_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, training={"max_steps": 1}, wandb={"mode": "disabled"})
    command = [sys.executable, "-c", AFTER_RUN, "debug", str(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported: []"


def test_transformers_still_recognises_models_of_peft() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    assert not trainer_utils._is_peft_model(plain)
    assert not isinstance(plain, callback_api.PeftModel | callback_api.PeftMixedModel)
    adapted = get_peft_model(plain, LoraConfig(target_modules=["0"]))
    assert trainer_utils._is_peft_model(adapted)
    assert isinstance(adapted, callback_api.PeftModel)
    assert not isinstance(adapted, callback_api.PeftMixedModel)
