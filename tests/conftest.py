"""Every test runs without a hub and without a W&B account; the project needs neither."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tests are about the CPU unless marked gpu
