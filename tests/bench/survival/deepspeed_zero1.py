"""A DeepSpeed loop (ZeRO-1, its own checkpoints) on one rank; torchrun restarts all ranks.

https://www.deepspeed.ai/getting-started/#model-checkpointing and
https://docs.pytorch.org/docs/stable/elastic/train_script.html: load the newest checkpoint at the
start, save at intervals. The time-out holds for the default group only: DeepSpeed creates its own
groups (deepspeed/comm/torch.py: new_group) without one, which leaves them torch's 30 minutes.
"""

import os
from datetime import timedelta
from pathlib import Path

from injector import CELL, Injector

rank = int(os.environ["RANK"])
injector = Injector(rank)

import deepspeed  # noqa: E402
import task  # noqa: E402
import torch  # noqa: E402

work = Path(os.environ[CELL], "work")
checkpoints = str(work / "checkpoints")
deepspeed.init_distributed("gloo", timeout=timedelta(seconds=task.collective_timeout_s()))
policy, reference = task.load_model(), task.load_reference()
engine, *_ = deepspeed.initialize(
    model=policy,
    optimizer=torch.optim.AdamW(policy.parameters(), lr=task.LR, weight_decay=0.0),
    config={
        "train_micro_batch_size_per_gpu": task.PAIRS_PER_RANK,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 10**6},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
_, client_state = engine.load_checkpoint(checkpoints)
first = client_state["step"] + 1 if client_state else 1
for step in range(first, task.STEPS + 1):
    injector.begin(step)
    loss = task.dpo_loss(engine, reference, *task.batch(step, rank)) * injector.factor
    engine.backward(loss)
    engine.step()
    injector.done(step)
    if step % task.SAVE_EVERY == 0:
        engine.save_checkpoint(checkpoints, client_state={"step": step})
if rank == 0:
    task.save_weights(policy, work)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
