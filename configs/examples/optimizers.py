"""Use different optimizers and schedulers: functions called on every rank with its parameters."""

import sys

from torch import optim

from orchestrator import debug, load_spec, train

run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
spec = load_spec("configs/examples/base.yaml", ["run.name=optimizers-python", *overrides])
run(
    spec,
    optimizers=(  # None for one of them uses the settings
        lambda params: optim.SGD(params, lr=0.1),
        lambda optimizer: optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5),
    ),
)
