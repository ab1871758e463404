"""Use mixed precision training: a setting in Python as well, where `load_spec` takes what the
command line does. fp32 disables it.
"""

import sys

from orchestrator import debug, load_spec, train

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
run(
    load_spec(
        "configs/examples/base.yaml", ["run.name=precision-python", "precision=fp16", *overrides]
    )
)
