"""Train any architecture for a few steps, export it, and compare what the policy and the export
say.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orchestrator.models.storage import persistent_buffers
from orchestrator.run.local.trial import NothingToSave
from orchestrator.settings.load import make_spec
from orchestrator.training.assemble import assembled
from orchestrator.training.context import RunContext
from orchestrator.training.export import export
from orchestrator.training.prepare import prepare
from orchestrator.training.rundir import RunDir
from orchestrator.world import World
from support.tiny_parts import ALONE, tokenizer
from support.tiny_settings import raw_settings

IDS = torch.arange(3, 43).view(2, 20)
TOLERANCE = 1e-6  # of the largest logit, or of 1 where that is smaller


def random_base(folder: Path, config: PreTrainedConfig, seed: int = 5) -> Path:
    """Write a model of that config with its tokenizer: weights, biases and router buffers are
    random, none is as its class initialises it.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *persistent_buffers(model).values()):
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def export_error(folder: Path, base: Path, world: World = ALONE, **settings: Any) -> float:
    """Train the model in `base` below `folder`, and return by how much the export's logits differ
    from the policy's.

    0 for ranks but the first. settings: blocks of `raw_settings`.
    """
    policy, run_dir = trained_logits(folder, base, world, **settings)
    if not world.is_main:
        return 0.0
    exported, report = AutoModelForCausalLM.from_pretrained(
        run_dir.model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    actual = logits(exported)
    return ((actual - policy).abs().max() / policy.abs().max().clamp(min=1)).item()


def trained_logits(
    folder: Path, base: Path, world: World = ALONE, **settings: Any
) -> tuple[torch.Tensor, RunDir]:
    """Take three large steps, export the last one; return the policy's logits, as it is in memory,
    and the run.
    """
    blocks = {
        "model": {"init": None, "path": str(base), **settings.pop("model", {})},
        "data": {"eval": None},
        "dpo": {"router_aux_loss_coef": 0.0} if _has_router(base) else {},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 3, "logging_steps": 1},
    }
    spec = make_spec(raw_settings(folder, **{**blocks, **settings}))
    run_dir = RunDir(spec.run_dir)
    if world.is_main:
        run_dir.begin(spec)
    world.gather(None)
    with assembled(RunContext(spec, world, NothingToSave(), run_dir), prepare(spec)) as trainer:
        trainer.fit()
        policy = trainer.engine.step.policy
        with _plain_attention(policy):
            output = trainer.engine.run_in_forward(lambda: logits(policy))
    if world.is_main:
        export(run_dir, run_dir.model)
    return output, run_dir


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return what a model says of two made-up rows."""
    training = model.training
    actual = model.eval()(input_ids=IDS.to(model.device), use_cache=False).logits.float().cpu()
    model.train(training)
    return actual


def changed_file(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a model's file; names have __ for each dot."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute whole rows, as the export will."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _has_router(base: Path) -> bool:
    return "router" in json.dumps(json.loads((base / "config.json").read_text()))


def export_error_on_ranks(
    world: World, folder: Path, base: Path, settings: dict[str, Any]
) -> float:
    """`export_error`, for ranks.Ranks; data files have to be there."""
    return export_error(folder, base, world, **settings)
