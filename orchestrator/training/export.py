"""A checkpoint -> a Hugging Face model folder that from_pretrained loads, with a card that says how it was trained."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from orchestrator.models.adapters import without_adapter
from orchestrator.models.policy import DTYPES, build_policy, cast_to
from orchestrator.models.reference import PolicyStart, identity_of
from orchestrator.settings.load import load_spec
from orchestrator.settings.spec import Dtype, Exported, RunSpec, SourceSpec, UserError
from orchestrator.training.checkpoint import Reader, newest_valid
from orchestrator.training.manifest import step_folder, verify
from orchestrator.training.metrics import evaluated_sets
from orchestrator.training.rundir import RunDir
from orchestrator.world import World

TRAINED_BY = "Trained with preference pairs by dpo-orchestrator."


def export(
    run_dir: RunDir,
    out: Path,
    dtype: Dtype = "fp32",
    checkpoint: Path | None = None,
    which: Exported | None = None,
) -> Path:
    """Write a checkpoint as safetensors with tokenizer, generation config and card.

    which: the newest whole one, or the best that this one knows of; if not given, what checkpoint.export says.

    The weights come from the checkpoint alone, so any engine's run exports in the same way, on any machine; a LoRA run
    needs its base (model.path) as well, into which its adapter is merged. The folder is renamed into place when it is
    complete.

    Raises:
        UserError: the run has no such checkpoint that is whole, or one of another format, or `out` exists and is not
            an earlier export.
        ReadFailed: the newest checkpoint cannot be read now.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any
    spec = load_spec(run_dir.config)
    if checkpoint is None:
        checkpoint = _chosen(run_dir, which or spec.checkpoint.export)
    if out.is_file():
        raise UserError("OUT", str(out), "is a file", "choose a new folder")
    if out.exists() and any(out.iterdir()) and not _is_export(out):
        raise UserError("OUT", str(out), "is a folder with other things in it", "choose a new folder")
    reader = Reader(checkpoint)
    if spec.model.lora is not None:
        model = cast_to(_merged(run_dir, spec, reader), dtype)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run_dir.tokenizer), dtype=DTYPES[dtype])
        _fill(model, reader, "")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    for file in run_dir.tokenizer.iterdir():  # after it: save_pretrained writes a generation config of defaults
        if file.name != "config.json":
            shutil.copy(file, partial)
    (partial / "README.md").write_text(_card(spec, reader.meta, _last_metrics(run_dir, reader.meta["step"])))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def _chosen(run_dir: RunDir, which: Exported) -> Path:
    newest, complaints = newest_valid(run_dir.checkpoints, World(0, 1, 0, torch.device("cpu")))
    if newest is None:
        rule = "has no whole checkpoint" + "".join(f" ({line})" for line in complaints)
        raise UserError("RUN_DIR", str(run_dir.path), rule, "train it further first")
    if which == "last":
        return newest
    step = Reader(newest).meta["callbacks"]["best_global_step"]
    best = step_folder(run_dir.checkpoints, step or 0)
    if step is None or (complaints := verify(best)):
        rule = f"its best checkpoint is not whole ({complaints[0]})" if step else "no step of it was the best so far"
        raise UserError("RUN_DIR", str(run_dir.path), rule, "export the last one: --checkpoint last")
    return best


@torch.no_grad()
def _fill(model: torch.nn.Module, reader: Reader, part: str) -> None:
    """Fill the parameters whose name holds `part` from the checkpoint."""
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.copy_(reader.parameter(name))


def _merged(run_dir: RunDir, spec: RunSpec, reader: Reader) -> Any:
    """The base made as for training, quantised and all, with the trained adapter merged into it, in fp32.

    Raises:
        UserError: the base is not the one that the adapter was trained on.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run_dir.tokenizer)
    model: Any = build_policy(spec, tokenizer, torch.float64 if spec.precision == "fp64" else torch.float32)
    _fill(model, reader, ".lora_")
    trained_on = reader.meta["identity"].get("base", reader.meta["identity"]["reference"])["weights"]
    found = identity_of(PolicyStart(model).tensors(), model.config, World(0, 1, 0, torch.device("cpu")))["weights"]
    if found != trained_on:
        rule = "its weights are not those that the adapter was trained on"
        raise UserError("model.path", spec.model.path, rule, "put them back")
    if spec.model.lora is not None and spec.model.lora.base in DTYPES:
        model = cast_to(model, "fp32")  # to add in fp32
    return without_adapter(model, merged=True)


def _is_export(folder: Path) -> bool:
    """Whether a folder is ours to replace: a user's own model has a config.json as well."""
    card = folder / "README.md"
    return card.is_file() and TRAINED_BY in card.read_text()


def _last_metrics(run_dir: RunDir, step: int) -> dict[str, Any]:
    """What was last measured up to a step."""
    last: dict[str, Any] = {}
    if run_dir.metrics.is_file():
        for line in run_dir.metrics.read_text().splitlines():
            with suppress(ValueError):  # half a line of a run that was killed
                measured = json.loads(line)
                last |= measured if measured["step"] <= step else {}
    return last


def _named(source: SourceSpec) -> str:
    path = Path(source.path).name if source.path.startswith("/") else source.path
    return " ".join([path, *filter(None, (source.name, source.split))])


def _card(spec: RunSpec, meta: dict[str, Any], metrics: dict[str, Any]) -> str:
    base = spec.model.path or f"random {spec.model.init.model_type if spec.model.init else ''} weights"
    hub_base = f"base_model: {base}\n" if spec.model.path and not spec.model.path.startswith("/") else ""
    start = "the base with its adapter as it was" if spec.model.lora and spec.model.lora.adapter_path else "the base"
    schedule = f"{spec.scheduler.name}, {spec.scheduler.warmup_steps} warm-up steps"
    weighted = zip(spec.dpo.loss_types, spec.dpo.weights, strict=True)
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weighted)
    rows = {
        "Base": base,
        "Method": f"DPO ({losses}, beta {spec.dpo.beta})",
        "Reference": f"{spec.reference.path or start} ({spec.reference.kind})",
        "Preference pairs": ", ".join(map(_named, spec.data.train)),
        "Pairs seen": meta["pairs_seen"],
        "Optimizer steps": meta["step"],
        "Global batch": f"{spec.batch.global_batch_size} pairs",
        "Optimizer": f"{spec.optimizer.name}, peak learning rate {spec.optimizer.lr} ({schedule})",
        "Precision": spec.precision,
        "Longest sequence": f"{spec.data.max_length} tokens",
        "Seed": spec.run.seed,
    }
    wanted = [
        f"{prefix}{name}"
        for prefix in ("", *evaluated_sets(metrics).values())
        for name in ("loss", "rewards/accuracies", "rewards/margins")
    ]
    measured = {name: f"{metrics[name]:.4f}" for name in wanted if name in metrics}
    return (
        f"---\nlibrary_name: transformers\n{hub_base}tags:\n- dpo\n- dpo-orchestrator\n---\n\n# {spec.run.name}\n\n"
        f"{TRAINED_BY}\n\n| | |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
        + "\n## Last measured\n\n| metric | value |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in measured.items())
    )
