"""What pydantic says of wrong settings -> errors of ours, one line for each key, with what was meant."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from orchestrator.settings.spec import Block, RunSpec, UserError


def explain(error: ValidationError) -> list[UserError]:
    """Pydantic's complaints as errors of ours, one per key, each with its rule and cure."""
    return [_explain_one(details) for details in error.errors()]


def _explain_one(details: Any) -> UserError:
    location, kind, value = details["loc"], details["type"], details["input"]
    key, name = _dotted(location), str(location[-1])
    block = _block_at(location[:-1])
    field = block.model_fields.get(name) if block else None
    if kind == "extra_forbidden" and block:
        return UserError(key, value, "is not a setting", _cure_of_unknown(block, location))
    if kind == "model_type" and (inner := _block_at(location)):
        return UserError(key, value, "is a block of settings", "its keys are " + ", ".join(inner.model_fields))
    described = f"it is: {field.description}" if field and field.description else "see orchestrator/settings/spec.py"
    if kind == "missing":
        return UserError(key, None, "is required", described)
    if kind == "literal_error":
        allowed = details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        meant = "disabled" if value is False and "disabled" in allowed else str(value)  # YAML reads off as false
        if isinstance(value, list):
            meant = next((str(entry) for entry in value if entry not in allowed), "")
        near = difflib.get_close_matches(meant, allowed, n=1)
        cure = f"did you mean {near[0]}?" if near else f"set it to {allowed[0]}"
        if name == "loss_type" and meant in RECIPES:
            cure = f"set {RECIPES[meant]}"
        return UserError(key, value, f"must be one of {', '.join(allowed)}", cure)
    default = field.get_default(call_default_factory=True) if field and not field.is_required() else None
    cure = f"for example {key}={default} ({described})" if default not in (None, {}, []) else described
    if key == "callbacks":
        cure = f"for example callbacks=[{value}]" if isinstance(value, str) else "give a list of module:attr"
    return UserError(key, value, details["msg"][0].lower() + details["msg"][1:], cure)


# Losses that are others here, and how to have them.
RECIPES = {
    "dpo": "dpo.loss_type=sigmoid",
    "rpo": "dpo.loss_type=[sigmoid, sft] and dpo.loss_weights=[1, alpha]",
    "mpo": "dpo.loss_type=[sigmoid, bco_pair, sft] and dpo.loss_weights=[0.8, 0.2, 1]",
    "slic": "dpo.loss_type=hinge",
}
# What users of TRL will type first, and where it is here.
TRL_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size (accumulation is derived)",
    "max_grad_norm": "training.max_grad_norm",
    "lr_scheduler_type": "scheduler.name",
    "lr_scheduler_kwargs": "scheduler.kwargs",
    "warmup_steps": "scheduler.warmup_steps",
    "warmup_ratio": "scheduler.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.kwargs={betas: [0.9, 0.999]}",
    "adam_beta2": "optimizer.kwargs={betas: [0.9, 0.999]}",
    "adam_epsilon": "optimizer.kwargs={eps: 1e-8}",
    "optim_args": "optimizer.kwargs",
    "deepspeed": "engine.deepspeed_config",
    "fsdp": "engine.kind=fsdp",
    "optim": "optimizer.name",
    "output_dir": "run.dir and run.name",
    "run_name": "run.name",
    "resume_from_checkpoint": "the same command again, which resumes the run",
    "model_name_or_path": "model.path",
    "processing_class": "model.tokenizer",
    "disable_dropout": "model.disable_dropout",
    "attn_implementation": "model.attention",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "tf32": "precision=tf32",
    "eval_steps": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps=N, or evaluation.every_epoch=true",
    "eval_on_start": "evaluation.at_start",
    "metric_for_best_model": "evaluation.metric_for_best",
    "greater_is_better": "evaluation.greater_is_better",
    "load_best_model_at_end": "checkpoint.export=best",
    "compute_metrics": "evaluation.compute_metrics",
    "batch_eval_metrics": "evaluation.batch_eval_metrics",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "early_stopping_patience": "evaluation.early_stopping.patience",
    "early_stopping_threshold": "evaluation.early_stopping.min_delta",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps (with evaluation.metric_for_best the best is saved as well)",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "training.logging_steps",
    "max_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_completion_length",
    "truncation_mode": "data.truncation",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "dataset_num_proc": "data.num_proc",
    "data_collator": "data.collator",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "dataset_config": "data.train as {path, name}",
    "dataset_train_split": "data.train as {path, split}",
    "dataset_test_split": "data.eval as {path, split}",
    "datasets": "data.train, a list of {path, weight}",
    "test_split_size": "data.eval_fraction",
    "chat_template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "default_system": "data.system_prompt",
    "pad_token": "model.pad_token",
    "beta": "dpo.beta",
    "loss_type": "dpo.loss_type",
    "loss_weights": "dpo.loss_weights",
    "label_smoothing": "dpo.label_smoothing",
    "f_divergence_type": "dpo.f_divergence_type",
    "f_alpha_divergence_coef": "dpo.f_alpha_divergence_coef",
    "discopop_tau": "dpo.discopop_tau",
    "ld_alpha": "dpo.ld_alpha",
    "use_weighting": "dpo.use_weighting",
    "router_aux_loss_coef": "dpo.router_aux_loss_coef",
    "simpo_gamma": "dpo.simpo_gamma",
    "rpo_alpha": "dpo.loss_type=[sigmoid, sft] with dpo.loss_weights=[1, rpo_alpha]",
    "seed": "run.seed",
    "report_to": "callbacks=[tensorboard] for TensorBoard and others, wandb.mode for W&B",
    "peft_config": "model.lora",
    "quantization_config": "model.lora.base for a policy, reference.kind for a reference",
    "load_in_8bit": "model.lora.base=int8 for a policy, reference.kind=int8 for a reference",
    "load_in_4bit": "model.lora.base=nf4 for a policy, reference.kind=nf4 for a reference",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "precompute_ref_log_probs": "reference.kind=precomputed",
    "sync_ref_model": "reference.sync_every",
    "ref_model_sync_steps": "reference.sync_every",
    "ref_model_mixup_alpha": "reference.sync_alpha",
    "ref_model": "reference.path",
}


def _cure_of_unknown(block: type[Block], location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    if name in TRL_NAMES:
        return f"did you mean {TRL_NAMES[name]}?"
    if near := difflib.get_close_matches(name, block.model_fields, n=1, cutoff=0.6):
        return f"did you mean {_dotted((*location[:-1], near[0]))}?"
    return "the keys here are " + ", ".join(block.model_fields)


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if part != "")  # which a single evaluation set has as its name


def _block_at(location: tuple[int | str, ...]) -> type[Block] | None:
    """The block of settings that a path of keys leads to, if it leads to one."""
    block: type[Block] = RunSpec
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):  # an entry of a list of blocks
            continue
        field = block.model_fields.get(part)
        if field and get_origin(field.annotation) is dict:  # blocks by name
            next(parts, None)
        blocks = [kind for kind in _types_in(field.annotation) if issubclass(kind, Block)] if field else []
        if not blocks:
            return None
        block = blocks[0]
    return block


def _types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)
