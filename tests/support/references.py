"""Policies, references and log-probs for tests of references."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from orchestrator import create_reference_model
from orchestrator.data.collate import Counts, PairBatch
from orchestrator.dpo.step import PairStep
from orchestrator.models.attention import use_packed_attention
from orchestrator.models.build_reference import build_reference
from orchestrator.models.layers import decoder_layers
from orchestrator.models.policy import build_policy
from orchestrator.models.reference import Reference
from orchestrator.settings.loss import DpoSpec
from orchestrator.settings.run import RunSpec
from support.tiny_parts import (
    tokenizer,
)

LAYERS = 4
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 64}
DPO = DpoSpec(beta=0.3)


def built(
    spec: RunSpec, packed: bool = True, ref_model: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Any]:
    """Policy and reference, for one layout."""
    policy = build_policy(spec, tokenizer(), dtype)
    reference = build_reference(spec, policy, dtype, ref_model)
    for model in {policy, reference.model} if packed else ():
        use_packed_attention(model, "cpu")
    return policy, reference


def step_logps(policy: PreTrainedModel, reference: Reference, batch: PairBatch) -> torch.Tensor:
    """Return the reference's log-probs within a step, after the policy's body."""
    return PairStep(policy, reference, DPO)(batch, Counts(4, 1)).ref_logps


def moved(policy: PreTrainedModel) -> None:
    """Change everything that trains."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)


def sharing_words(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def counters(policy: PreTrainedModel, reference: Reference) -> Counter[str]:
    """Forward passes of each layer, of policy and reference, from now on; a shared one is the
    policy's.
    """
    passes: Counter[str] = Counter()

    def count(name: str, module: nn.Module) -> None:
        # forward itself, not a hook: gradient checkpointing runs a layer again without its hooks
        inner = module.input_layernorm.forward
        module.input_layernorm.forward = lambda *args: passes.update([name]) or inner(*args)

    policys = {id(m): f"policy {i}" for i, m in enumerate(decoder_layers(policy))}
    for number, layer in enumerate(decoder_layers(policy)):
        count(f"policy {number}", layer)
    for number, layer in enumerate(decoder_layers(reference.model)):
        if id(layer) not in policys:
            count(f"reference {number}", layer)
    return passes


GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


LORA = {"lora": {"r": 4}}


def ours(policy: PreTrainedModel) -> PreTrainedModel:
    return create_reference_model(policy, num_shared_layers=2)
