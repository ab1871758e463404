"""TRL's DPOTrainer on our rows, model and tokenizer: the other side of every parity test."""

from types import SimpleNamespace
from typing import Any

import pytest

NO_TRL = (
    "parity is measured against TRL, which is not installed: pip install 'dpo-orchestrator[test]'"
)


def need_trl() -> None:
    """Skip the calling module where TRL is missing."""
    pytest.importorskip("trl", reason=NO_TRL)


def trl_trainer(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    *,
    ref_model: Any = None,
    peft_config: Any = None,
    eval_dataset: Any = None,
    callbacks: Any = None,
    **settings: Any,
) -> Any:
    """A DPOTrainer on the CPU in fp32 that logs every step and saves nothing.

    Without a ref_model TRL loads the folder or hub name that `model` was loaded from.
    """
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = DPOConfig(
        **{
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            "dataset_num_proc": None,
            **settings,
        }
    )
    return DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def trl_tokens(dataset: Any, tokenizer: Any, max_length: int | None = None) -> list[dict[str, Any]]:
    """The rows of a trainer's train_dataset, of a Dataset or an IterableDataset, by the method that
    makes them: a hundred times faster than a trainer with a model, in which keep_start drops what
    fills max_length.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    args: Any = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    return list(DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train"))
