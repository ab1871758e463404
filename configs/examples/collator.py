"""Use a custom data collator: TRL's own, here padding with token 0."""

import sys

# first: it silences the log of bitsandbytes, which TRL imports
from orchestrator import debug, load_spec, train

# isort: split
from trl.trainer.dpo_trainer import DataCollatorForPreference

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
spec = load_spec("configs/examples/base.yaml", ["run.name=collator-python", *overrides])
run(spec, data_collator=DataCollatorForPreference(pad_token_id=0))
