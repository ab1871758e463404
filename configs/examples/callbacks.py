"""Add custom callbacks: transformers.TrainerCallbacks, called on rank 0."""

import sys

from transformers import TrainerCallback

from orchestrator import debug, load_spec, train


class CustomLoggingCallback(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            print(f"Step {state.global_step}: {logs}")


if __name__ == "__main__":  # callbacks.yaml imports the class
    run = debug if "--debug" in sys.argv else train
    overrides = [word for word in sys.argv if "=" in word]
    spec = load_spec("configs/examples/base.yaml", ["run.name=callbacks-python", *overrides])
    run(spec, callbacks=[CustomLoggingCallback()])
