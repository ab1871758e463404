"""A plain DDP loop on bare Ray Train, with its documented pattern for checkpoints and failures.

https://docs.ray.io/en/latest/train/user-guides/checkpoints.html (report, get_checkpoint) and
https://docs.ray.io/en/latest/train/user-guides/fault-tolerance.html (FailureConfig; the same name
and storage_path continue a run whose driver was lost).
"""

import os
import tempfile
from pathlib import Path
from typing import Any


def train_loop(_: dict[str, Any]) -> None:
    """One rank."""
    import ray.train
    from injector import CELL, Injector

    rank = ray.train.get_context().get_world_rank()
    injector = Injector(rank)
    import ray.train.torch
    import task
    import torch

    model = ray.train.torch.prepare_model(task.load_model())
    reference = task.load_reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.LR, weight_decay=0.0)
    first = 1
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"))
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    for step in range(first, task.STEPS + 1):
        injector.begin(step)
        optimizer.zero_grad()
        loss = task.dpo_loss(model, reference, *task.batch(step, rank)) * injector.factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        injector.done(step)
        if step % task.SAVE_EVERY:
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                state = {
                    "model": model.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                }
                torch.save(state, os.path.join(folder, "state.pt"))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"loss": loss.item()}, checkpoint=checkpoint)
    if rank == 0:
        task.save_weights(model.module, Path(os.environ[CELL], "work"))


def main() -> None:
    """The driver."""
    import ray
    import task
    from injector import CELL
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="local", num_cpus=task.RANKS, include_dashboard=False)
    TorchTrainer(
        train_loop,
        torch_config=TorchConfig(backend="gloo", timeout_s=task.collective_timeout_s()),
        scaling_config=ScalingConfig(num_workers=task.RANKS),
        run_config=RunConfig(
            name="run",
            storage_path=str(Path(os.environ[CELL], "work", "storage")),
            failure_config=FailureConfig(max_failures=task.RESTARTS),
            checkpoint_config=CheckpointConfig(num_to_keep=task.KEEP),
        ),
    ).fit()


if __name__ == "__main__":
    main()
