"""Use mixed precision training: `load_spec` takes the settings that the command line does.

fp32 disables it.
"""

import sys

from orchestrator import debug, load_spec, train

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
overrides = ["run.name=precision-python", "precision=fp16", *overrides]
run(load_spec("configs/examples/base.yaml", overrides))
