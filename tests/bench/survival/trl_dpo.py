"""TRL's DPOTrainer on one rank; torchrun starts it, and a shell loop runs the same command until it
exits with 0.

As TRL's own script does (trl/scripts/dpo.py), with `resume_from_checkpoint`:
https://huggingface.co/docs/transformers/trainer#checkpoints. `enable_jit_checkpoint` is what
transformers offers for preemption: https://huggingface.co/docs/transformers/main_classes/trainer.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from injector import CELL, Injector

injector = Injector(int(os.environ["RANK"]))

import task  # noqa: E402
import torch  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402


class Steps(TrainerCallback):
    """Calls the injector."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        injector.begin(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        injector.done(state.global_step)


class Trainer(DPOTrainer):
    """DPOTrainer, whose loss the injector may spoil."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if isinstance(loss, tuple):
            return loss[0] * injector.factor, *loss[1:]
        return loss * injector.factor


# transformers passes ddp_timeout on with GPUs only; accelerate uses the group that it finds
timeout = timedelta(seconds=task.collective_timeout_s())
torch.distributed.init_process_group("gloo", timeout=timeout)
work = Path(os.environ[CELL], "work")
args = DPOConfig(
    output_dir=str(work / "out"),
    max_steps=task.STEPS,
    per_device_train_batch_size=task.PAIRS_PER_RANK,
    learning_rate=task.LR,
    lr_scheduler_type="constant",
    beta=task.BETA,
    save_steps=task.SAVE_EVERY,
    save_total_limit=task.KEEP,
    enable_jit_checkpoint=True,
    logging_steps=1,
    ddp_timeout=int(timeout.total_seconds()),
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    disable_tqdm=True,
)
os.makedirs(args.output_dir, exist_ok=True)
trainer = Trainer(
    model=str(task.model_folder()),
    args=args,
    train_dataset=load_dataset(
        "json", data_files=str(task.pairs_file()), split="train", cache_dir=str(work / "datasets")
    ),
    callbacks=[Steps()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) is not None)
trainer.save_model(str(work / "final"))
