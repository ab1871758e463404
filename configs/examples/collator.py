"""Use a custom data collator: TRL's own, here padding with token 0."""

import sys

from orchestrator import (
    debug,
    load_spec,
    train,
)  # first: it quiets what bitsandbytes says when TRL imports it

# isort: split
from trl.trainer.dpo_trainer import DataCollatorForPreference

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
spec = load_spec("configs/examples/base.yaml", ["run.name=collator-python", *overrides])
run(spec, data_collator=DataCollatorForPreference(pad_token_id=0))
