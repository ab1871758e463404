"""Check that weights read from files match their model: all present, all used, all finite."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.settings.errors import UserError

Shape = tuple[int, ...]

# Wrappers that add a prefix, anywhere in a name, to the keys of `state_dict`.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning",
    "base_model.model.": "peft",
    "pretrained_model.": "TRL's value head",
}
HEADS_OF_OTHER_TASKS = re.compile(
    r"(^|\.)(score|v_head|value_head|reward_head|classifier|regression_head)\."
)
# Weights that no causal LM of transformers uses: heads that predict further tokens, and buffers of
# old releases.
NEVER_USED = re.compile(r"(^|\.)mtp(_\w+)?\.|inv_freq$|\.masked_bias$")


@dataclass(frozen=True)
class WeightDifferences:
    """Differences, by name, between the weights of files and those that a model has."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[tuple[str, Shape, Shape]]  # name, shape in the files, shape in the model

    @classmethod
    def from_loading_info(cls, info: dict[str, Any]) -> "WeightDifferences":
        """Return the differences that transformers' `from_pretrained(output_loading_info=True)`
        reports.
        """
        unexpected = sorted(name for name in info["unexpected_keys"] if not NEVER_USED.search(name))
        mismatched = sorted(
            (name, tuple(ours), tuple(its)) for name, ours, its in info["mismatched_keys"]
        )
        return cls(sorted(info["missing_keys"]), unexpected, mismatched)

    @classmethod
    def between(cls, files: dict[str, Shape], model: dict[str, Shape]) -> "WeightDifferences":
        """Return the differences between the shapes in files and those in a model."""
        both = sorted(files.keys() & model.keys())
        mismatched = [
            (name, files[name], model[name]) for name in both if files[name] != model[name]
        ]
        return cls(
            sorted(model.keys() - files.keys()), sorted(files.keys() - model.keys()), mismatched
        )


def check_complete(
    key: str, source: str, differences: WeightDifferences, model: str, fix: str | None = None
) -> None:
    """Check that files hold exactly the weights that the model has.

    transformers and peft initialise missing weights anew, and drop the others, without an error.

    Args:
        key: the setting that names the files.
        source: the value of that setting.
        differences: weights that are missing, not used, or of another shape.
        model: the model in words, for the message ("a Qwen2ForCausalLM").
        fix: what to change where weights are missing or not used; None: the fix for a whole model.

    Raises:
        UserError: the weights are not exactly those of the model.
    """
    missing, unexpected = differences.missing, differences.unexpected
    mismatched = differences.mismatched
    if mismatched:
        name, in_files, in_model = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        rule = f"{name} has shape {in_files} in its files, but {model} needs {in_model}{more}"
        raise UserError(key, source, rule, "use files and a config that belong together")
    if missing and (wrapper := _wrapper_in(unexpected)):
        rule = (
            f"{wrapper!r} of {WRAPPERS[wrapper]} is in the names of its weights, so "
            f"{_listed(missing)} missing"
        )
        raise UserError(
            key,
            source,
            rule,
            f"save the model without the wrapper, or remove {wrapper!r} from the names",
        )
    if missing or unexpected:
        rules = []
        if missing:
            rules.append(
                f"{_listed(missing)} missing from its files and would be newly initialised"
            )
        if unexpected:
            rules.append(
                f"its files hold what {model} does not use: {_listed(unexpected, verb=False)}"
            )
        raise UserError(key, source, "; ".join(rules), fix or _fix(missing, unexpected, model))


def check_finite(key: str, source: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that no weight holds NaN or inf.

    The extremes are computed without a copy: mapped files are read once, and not written.

    Raises:
        UserError: a tensor, which the error names, is not finite.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            continue
        # NaN propagates into both
        if not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            bad = int((~torch.isfinite(tensor)).sum())
            kind = "NaN" if tensor.isnan().any() else "inf"
            rule = (
                f"{name} holds {kind}: {bad} of its {tensor.numel()} values are not finite in "
                f"{tensor.dtype}"
            )
            fix = "use a checkpoint saved before the weights diverged, or download it again"
            raise UserError(key, source, rule.replace("torch.", ""), fix)


def _wrapper_in(names: Sequence[str]) -> str | None:
    """Return the prefix of a known wrapper that occurs in one of the names."""
    for prefix in WRAPPERS:
        if any(re.search(rf"(^|\.){re.escape(prefix)}", name) for name in names):
            return prefix
    return None


def _listed(names: Sequence[str], verb: bool = True) -> str:
    """Return the first names and their count ("26 weights (a, b, c, ...) are"), with a verb if
    needed.
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if len(names) == 1:
        return f"weight {shown}" + " is" * verb
    return f"{len(names)} weights ({shown})" + " are" * verb


def _fix(missing: Sequence[str], unexpected: Sequence[str], model: str) -> str:
    if any(HEADS_OF_OTHER_TASKS.search(name) for name in unexpected):
        return "it is a reward, value or classification model: use a causal language model"
    if missing:
        return f"use a complete checkpoint of {model}"
    return "correct its config, or load it with transformers and save it again to drop them"
