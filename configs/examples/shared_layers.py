"""Memory-efficient fine-tuning with shared layers: each rank builds its reference."""

import sys

from orchestrator import create_reference_model, debug, load_spec, train

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
spec = load_spec("configs/examples/base.yaml", ["run.name=shared-layers-python", *overrides])
run(spec, ref_model=lambda policy: create_reference_model(policy, num_shared_layers=6))
