"""A checkpoint -> a Hugging Face model folder that from_pretrained loads, with a card that says how it was trained."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from orchestrator.settings.load import load_spec
from orchestrator.settings.spec import RunSpec, UserError
from orchestrator.training.checkpoint import Reader, newest_valid
from orchestrator.training.rundir import RunDir
from orchestrator.world import World

TRAINED_BY = "Trained with preference pairs by dpo-orchestrator."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(run_dir: RunDir, out: Path, dtype: str = "fp32", checkpoint: Path | None = None) -> Path:
    """Write the newest whole checkpoint (or the one given) as safetensors with tokenizer, generation config and card.

    The weights come from the checkpoint alone, so any engine's run exports in the same way, on any machine. The folder
    is renamed into place when it is complete.

    Raises:
        UserError: the run has no whole checkpoint, or one of another format, or `out` exists and is not an earlier
            export.
        ReadFailed: the newest checkpoint cannot be read now.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if checkpoint is None:
        checkpoint, complaints = newest_valid(run_dir.checkpoints, World(0, 1, 0, torch.device("cpu")))
        if checkpoint is None:
            raise UserError(
                "RUN_DIR",
                str(run_dir.path),
                "has no whole checkpoint" + "".join(f" ({line})" for line in complaints),
                "train it further first",
            )
    if out.is_file():
        raise UserError("OUT", str(out), "is a file", "choose a new folder")
    if out.exists() and any(out.iterdir()) and not _is_export(out):
        raise UserError("OUT", str(out), "is a folder with other things in it", "choose a new folder")
    reader = Reader(checkpoint)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run_dir.tokenizer), dtype=DTYPES[dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.parameter(name))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    for file in run_dir.tokenizer.iterdir():  # after it: save_pretrained writes a generation config of defaults
        if file.name != "config.json":
            shutil.copy(file, partial)
    (partial / "README.md").write_text(_card(load_spec(run_dir.config), reader.meta, _last_metrics(run_dir)))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def _is_export(folder: Path) -> bool:
    """Whether a folder is ours to replace: a user's own model has a config.json as well."""
    card = folder / "README.md"
    return card.is_file() and TRAINED_BY in card.read_text()


def _last_metrics(run_dir: RunDir) -> dict[str, Any]:
    last: dict[str, Any] = {}
    if run_dir.metrics.is_file():
        for line in run_dir.metrics.read_text().splitlines():
            with suppress(ValueError):  # half a line of a run that was killed
                last |= json.loads(line)
    return last


def _card(spec: RunSpec, meta: dict[str, Any], metrics: dict[str, Any]) -> str:
    base = spec.model.path or f"random {spec.model.init.model_type if spec.model.init else ''} weights"
    hub_base = f"base_model: {base}\n" if spec.model.path and not spec.model.path.startswith("/") else ""
    schedule = f"{spec.scheduler.name}, {spec.scheduler.warmup_steps} warm-up steps"
    rows = {
        "Base": base,
        "Method": f"DPO ({spec.dpo.loss_type}, beta {spec.dpo.beta})",
        "Reference": spec.reference.path or "frozen copy of the base",
        "Preference pairs": Path(spec.data.train).name if spec.data.train.startswith("/") else spec.data.train,
        "Pairs seen": meta["pairs_seen"],
        "Optimizer steps": meta["step"],
        "Global batch": f"{spec.batch.global_batch_size} pairs",
        "Optimizer": f"{spec.optimizer.name}, peak learning rate {spec.optimizer.lr} ({schedule})",
        "Precision": spec.precision,
        "Longest sequence": f"{spec.data.max_length} tokens",
        "Seed": spec.run.seed,
    }
    wanted = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
    )
    measured = {name: f"{metrics[name]:.4f}" for name in wanted if name in metrics}
    return (
        f"---\nlibrary_name: transformers\n{hub_base}tags:\n- dpo\n- dpo-orchestrator\n---\n\n# {spec.run.name}\n\n"
        f"{TRAINED_BY}\n\n| | |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
        + "\n## Last measured\n\n| metric | value |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in measured.items())
    )
