"""Keep what an export needs besides weights in RUN_DIR/tokenizer: the config, the tokenizer, the
generation config, image processors; and restore them after damage.
"""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from orchestrator.durable import sha256_of
from orchestrator.engines.precision import dtype_held
from orchestrator.models.layers import head_is_tied
from orchestrator.models.policy import build_policy, load_config, load_tokenizer
from orchestrator.settings.errors import UserError
from orchestrator.settings.run import RunSpec
from orchestrator.training.damage import tokenizer_damage
from orchestrator.training.manifest import (
    MANIFEST,
    sealed,
)
from orchestrator.training.run_identity import differences, tokenizer_hashes
from orchestrator.training.rundir import RunDir

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of a multimodal model that training does not read, but its export contains."""

logger = logging.getLogger(__name__)


def keep_for_export(
    run_dir: RunDir, spec: RunSpec, policy: Any, tokenizer: Any, loaded: Any
) -> None:
    """Write the files and a manifest of them.

    loaded: the config that the policy was built from.
    """
    config = exported_config(policy, loaded)
    partial = run_dir.tokenizer.with_name(f".{run_dir.tokenizer.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    config.save_pretrained(partial)
    if policy.generation_config is not None:
        # not save_pretrained, which rejects values for which loading only warns
        policy.generation_config.to_json_file(partial / "generation_config.json")
    # a multimodal model of which only the language model trains needs no files of the others
    source = spec.model.path if type(config) is type(loaded) else None
    for name in PROCESSOR_FILES if source else ():
        if (path := _file_at(str(source), name)) is not None:
            shutil.copyfile(path, partial / name)
    files = {
        str(path.relative_to(partial)): sha256_of(path)
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps(sealed({"files": files}), indent=1))
    replace_folder(run_dir.tokenizer, partial)


def replace_folder(folder: Path, new: Path) -> None:
    """Rename a folder to the name of another, which is deleted."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def restore_if_damaged(run_dir: RunDir, spec: RunSpec, identity: dict[str, Any]) -> None:
    """Write the files again from the model and the tokenizer of the settings, if they are damaged.

    identity: that of the checkpoint to export.

    Raises:
        UserError: the tokenizer or the model of the settings cannot be loaded, or the tokenizer is
            not the one that the run was started with.
    """
    if not (damaged := tokenizer_damage(run_dir.tokenizer)):
        return
    source = "the model" if spec.model.path else "the settings"
    logger.warning("%s; written again from %s that the run started with", damaged[0], source)
    tokenizer = load_tokenizer(spec)
    now = tokenizer_hashes(spec, tokenizer)
    before = {name: identity[name] for name in now if name in identity}
    if changes := list(differences(before, {name: now[name] for name in before})):
        rule = f"is not the tokenizer that the run was started with: {', '.join(changes)}"
        cure = f"restore it, or {run_dir.tokenizer}"
        raise UserError("model.tokenizer", spec.model.tokenizer or spec.model.path, rule, cure)
    policy = build_policy(spec, tokenizer, dtype_held(spec.precision))
    keep_for_export(run_dir, spec, policy, tokenizer, load_config(spec, tokenizer))


def exported_config(policy: Any, loaded: Any) -> Any:
    """Return the config of an export: the loaded one, with tie_word_embeddings as in the policy.

    Training uses its own copy, in which dropout and other noise may be off. transformers loads a
    separate head from a checkpoint even if the config ties it, and training with frozen embeddings
    unties the two.
    """
    # a text model may be loaded from a multimodal config
    parts = (loaded, loaded.get_text_config(), policy.config)
    config = copy.deepcopy(next(part for part in parts if type(part) is type(policy.config)))
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = head_is_tied(policy)
    config.architectures = [type(policy).__name__]
    config.dtype = policy.dtype
    config.__dict__.pop("quantization_config", None)  # an export is in full precision
    # of old files; the generation config has them now
    for name in config._get_generation_parameters():
        delattr(config, name)
    return config


def _file_at(source: str, name: str) -> str | None:
    """Return the path of a file of a model, in a folder or from the hub; None if there is none."""
    from transformers.utils.hub import cached_file

    try:
        return cached_file(source, name)
    except OSError:  # there is none, or the hub cannot be reached
        return None
