"""Export a checkpoint as a Hugging Face model folder with a model card."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from safetensors import SafetensorError

from orchestrator.data.file_lock import Poll, no_poll
from orchestrator.engines.precision import dtype_held
from orchestrator.models.adapters import base_name, check_mergeable, without_adapter
from orchestrator.models.dtypes import DTYPES
from orchestrator.models.identity import identity_of
from orchestrator.models.loading import NO_CODE
from orchestrator.models.policy import build_policy, cast_to
from orchestrator.models.quantized import is_quantized
from orchestrator.models.reference import PolicyStart
from orchestrator.models.storage import persistent_buffers, stored_tensors
from orchestrator.settings.checkpoint import Exported
from orchestrator.settings.counts import counted
from orchestrator.settings.data import SourceSpec
from orchestrator.settings.errors import UserError, type_and_message
from orchestrator.settings.load import load_spec
from orchestrator.settings.model import Dtype
from orchestrator.settings.run import RunSpec
from orchestrator.training.checkpoint_reader import Reader, newest_valid
from orchestrator.training.export_files import replace_folder, restore_if_damaged
from orchestrator.training.manifest import MANIFEST, step_folder, verify
from orchestrator.training.result import evaluated_sets
from orchestrator.training.rundir import RunDir
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED_BY = "Trained with preference pairs by dpo-orchestrator."

logger = logging.getLogger(__name__)


class ExportFailed(OSError):
    """A model could not be written; an earlier export is untouched."""


def export(
    run_dir: RunDir,
    out: Path,
    dtype: Dtype = "fp32",
    checkpoint: Path | None = None,
    which: Exported | None = None,
    poll: Poll = no_poll,
) -> Path:
    """Write a checkpoint as safetensors with tokenizer, generation config and model card.

    which: the newest complete checkpoint, or the best one recorded in it; default:
    checkpoint.export. poll: called for each weight, to be able to stop.

    The weights come from the checkpoint only, so the run of any engine exports in the same way, on
    any machine. A LoRA run also needs its base (model.path), into which the adapter is merged. The
    folder is renamed into place when it is complete.

    Raises:
        UserError: the run has no such complete checkpoint, or one of another format, or `out`
            exists and is not an earlier export.
        ReadFailed: the newest checkpoint cannot be read at the moment.
    """
    spec = load_spec(run_dir.settings())
    if checkpoint is None:
        checkpoint = _checkpoint_of(
            run_dir, which or spec.checkpoint.export, spec.evaluation.metric_for_best
        )
    if out.is_file():
        raise UserError("OUT", str(out), "is a file", "choose a new folder")
    is_ours = out == run_dir.model or not out.exists() or _is_export(out)
    if not is_ours and any(out.iterdir()):
        raise UserError("OUT", str(out), "is a folder with other files", "choose a new folder")
    reader = Reader(checkpoint)
    restore_if_damaged(run_dir, spec, reader.meta.get("identity", {}))
    reader.poll = poll
    model = (
        _merged(run_dir, spec, reader, dtype)
        if spec.model.lora
        else _trained(run_dir, spec, reader, dtype)
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        poll()
        _save(model, partial)
        poll()
        # after save_pretrained, which writes a default generation config
        shutil.copytree(run_dir.tokenizer, partial, ignore=_written, dirs_exist_ok=True)
        card = partial / "README.md"
        card.write_text(_card(spec, reader.meta, _last_metrics(run_dir, reader.meta["step"])))
        for file in filter(Path.is_file, partial.rglob("*")):
            file.chmod(card.stat().st_mode)  # the mode of a new file: safetensors writes with 0600
        replace_folder(out, partial)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # frees its space on a full disk
        reason = f"the model could not be written to {out} ({type_and_message(error)})"
        raise ExportFailed(f"{reason}; free space there, and run the same command again") from None
    return out


def _save(model: "PreTrainedModel", folder: Path) -> None:
    """Write weights and config as from_pretrained reads them."""
    # save_pretrained first unwraps the model, for which it would import DeepSpeed (2 s of CPU);
    # ours is not wrapped
    with mock.patch("transformers.modeling_utils.unwrap_model", new=lambda model: model):
        model.save_pretrained(folder)


def check_exportable(policy: Any, config: Any, spec: RunSpec) -> None:
    """Check before training that the model built from the exported config has exactly the policy's
    weights.

    Raises:
        UserError: one of the two lacks a weight, or has it in another shape; or an adapter cannot
            be merged.
    """
    if spec.model.lora is not None:
        check_mergeable(policy, spec.model.lora)
    with torch.device("meta"):
        built = _new_model(config, torch.float32)
    theirs = {name: tuple(value.shape) for name, value in stored_tensors(built).items()}
    ours = {
        base_name(name): tuple(value.shape)
        for name, value in stored_tensors(policy).items()
        if not _is_lora(name)
    }
    if is_quantized(policy):  # quantised weights are packed into other shapes
        theirs, ours = dict.fromkeys(theirs, ()), dict.fromkeys(ours, ())
    if different := sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    ):
        rule = (
            f"an export would not hold the trained weights: {_some(different)} differ from "
            "those of its config"
        )
        fix = "save the model once with transformers' save_pretrained, and use that folder"
        key = "model.path" if spec.model.path else "model.init"
        raise UserError(key, spec.model.path or config.model_type, rule, fix)


def _new_model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _some(names: list[str]) -> str:
    """Return the first names as text, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _written(_: str, names: list[str]) -> list[str]:
    """Ignore the config, which save_pretrained has written, and the manifest of the folder."""
    return [name for name in ("config.json", MANIFEST) if name in names]


def _checkpoint_of(run_dir: RunDir, which: Exported, metric: str | None) -> Path:
    newest, complaints = newest_valid(run_dir.checkpoints, World(0, 1, 0, torch.device("cpu")))
    if newest is None:
        rule = "has no complete checkpoint" + "".join(f" ({line})" for line in complaints)
        raise UserError("RUN_DIR", str(run_dir.path), rule, "train it further first")
    if which == "last":
        return newest
    step = Reader(newest).meta["callbacks"]["best_global_step"]
    best = step_folder(run_dir.checkpoints, step or 0)
    if step is None or (complaints := verify(best)):
        if step:
            rule = f"its best checkpoint is not complete ({complaints[0]})"
        else:
            reason = (
                f"no evaluation has measured {metric}"
                if metric
                else "evaluation.metric_for_best was not set"
            )
            rule = f"has no best checkpoint ({reason})"
        raise UserError(
            "RUN_DIR", str(run_dir.path), rule, "export the last one: --checkpoint last"
        )
    return best


@torch.no_grad()
def _trained(run_dir: RunDir, spec: RunSpec, reader: Reader, dtype: Dtype) -> Any:
    """Return the model of a run without LoRA, from the checkpoint only.

    Raises:
        UserError: the checkpoint lacks some of its weights.
    """
    from transformers import AutoConfig

    model = _new_model(AutoConfig.from_pretrained(run_dir.tokenizer, **NO_CODE), DTYPES[dtype])
    _untie(model, reader)
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() - reader.shapes.keys()):
        rule = f"does not hold {_some(missing)} of a {type(model).__name__}"
        raise UserError("checkpoint", str(reader.folder), rule, "export a checkpoint of this run")
    keeps = _kept_in_fp32(model, DTYPES[dtype])
    for name, parameter in parameters.items():
        parameter.data = reader.parameter(name).to(
            torch.float32 if keeps(name) else parameter.dtype
        )
    _fill_buffers(model, run_dir, spec, reader)
    return model


def _fill_buffers(model: Any, run_dir: RunDir, spec: RunSpec, reader: Reader) -> None:
    """Read the persistent buffers from the checkpoint, or from the initial model if an older
    version left them out.
    """
    buffers = persistent_buffers(model)
    left_out = sorted(buffers.keys() - reader.shapes.keys())
    start: dict[str, torch.Tensor] = {}
    if left_out:
        message = (
            "%s was written by a version that left out %s: read from the model that the "
            "run started with"
        )
        logger.warning(message, reader.folder, _some(left_out))
        start = persistent_buffers(build_policy(spec, _tokenizer(run_dir), torch.float32))
    for name, buffer in buffers.items():
        buffer.data = start[name] if name in left_out else reader.parameter(name)


def _untie(model: Any, reader: Reader) -> None:
    """Untie each weight that the checkpoint holds separately, in the model and in its config."""
    first: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if first.setdefault(id(parameter), name) != name and name in reader.shapes:
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner), leaf, torch.nn.Parameter(torch.empty_like(parameter))
            )
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return a function that tells whether transformers keeps a weight in fp32 when it loads the
    model in 16 bits.
    """
    patterns = list(model._get_dtype_plan(dtype))
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _tokenizer(run_dir: RunDir) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run_dir.tokenizer, **NO_CODE)


@torch.no_grad()
def _merged(run_dir: RunDir, spec: RunSpec, reader: Reader, dtype: Dtype) -> Any:
    """Return the base as it was built for training (quantised too), with the trained adapter merged
    into it in fp32.

    Raises:
        UserError: the base is not the one that the adapter was trained on.
    """
    from transformers import AutoConfig, GenerationConfig

    held = dtype_held(spec.precision)
    model: Any = build_policy(spec, _tokenizer(run_dir), held)
    for name, parameter in model.named_parameters():
        if _is_lora(name):
            parameter.copy_(reader.parameter(name))
    trained_on = reader.meta["identity"].get("base", reader.meta["identity"]["reference"])[
        "weights"
    ]
    actual = identity_of(
        PolicyStart(model).tensors(), model.config, World(0, 1, 0, torch.device("cpu"))
    )["weights"]
    if actual != trained_on:
        rule = "its weights are not those that the adapter was trained on"
        raise UserError("model.path", spec.model.path, rule, "restore them")
    if spec.model.lora is not None and spec.model.lora.base in DTYPES:
        model = cast_to(model, "fp32")  # the adapter is added in fp32
    model = without_adapter(model, merged=True)
    keeps = _kept_in_fp32(model, DTYPES[dtype])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keeps(name) else DTYPES[dtype])
    model.config = AutoConfig.from_pretrained(run_dir.tokenizer, **NO_CODE)
    model.generation_config = GenerationConfig()  # replaced by the file in the run directory
    return model


def _is_export(folder: Path) -> bool:
    """Return whether a folder is an export that may be replaced: a user's own model also has a
    config.json.
    """
    card = folder / "README.md"
    return card.is_file() and TRAINED_BY in card.read_text(errors="replace")


def _last_metrics(run_dir: RunDir, step: int) -> dict[str, Any]:
    """Return the last value of each metric up to a step."""
    last: dict[str, Any] = {}
    for measured in run_dir.metric_lines():
        last |= measured if measured.get("step", step + 1) <= step else {}
    return last


def _source_name(source: SourceSpec) -> str:
    path = Path(source.path).name if source.path.startswith("/") else source.path
    return " ".join([path, *filter(None, (source.name, source.split))])


def _card(spec: RunSpec, meta: dict[str, Any], metrics: dict[str, Any]) -> str:
    base = (
        spec.model.path or f"random {spec.model.init.model_type if spec.model.init else ''} weights"
    )
    hub_base = (
        f"base_model: {base}\n" if spec.model.path and not spec.model.path.startswith("/") else ""
    )
    start = (
        "the base with its initial adapter"
        if spec.model.lora and spec.model.lora.adapter_path
        else "the base"
    )
    schedule = f"{spec.scheduler.name}, {spec.scheduler.warmup_steps} warm-up steps"
    weighted = zip(spec.dpo.loss_types, spec.dpo.weights, strict=True)
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weighted)
    rows = {
        "Base": base,
        "Method": f"DPO ({losses}, beta {spec.dpo.beta})",
        "Reference": f"{spec.reference.path or start} ({spec.reference.kind})",
        "Preference pairs": ", ".join(map(_source_name, spec.data.train)),
        "Pairs seen": meta["pairs_seen"],
        "Optimizer steps": meta["step"],
        "Global batch": counted(spec.batch.global_batch_size, "pair"),
        "Optimizer": f"{spec.optimizer.name}, peak learning rate {spec.optimizer.lr} ({schedule})",
        "Precision": spec.precision,
        "Longest sequence": f"{spec.data.max_length} tokens",
        "Seed": spec.run.seed,
    }
    names = [
        f"{prefix}{name}"
        for prefix in ("", *evaluated_sets(metrics).values())
        for name in ("loss", "rewards/accuracies", "rewards/margins")
    ]
    measured = {name: f"{metrics[name]:.4f}" for name in names if name in metrics}
    return (
        f"---\nlibrary_name: transformers\n{hub_base}tags:\n- dpo\n- dpo-orchestrator\n---\n\n# "
        f"{spec.run.name}\n\n"
        f"{TRAINED_BY}\n\n| | |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in rows.items())
        + "\n## Last measured\n\n| metric | value |\n|---|---|\n"
        + "".join(f"| {key} | {value} |\n" for key, value in measured.items())
    )
