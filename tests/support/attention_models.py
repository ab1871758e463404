"""Models, batches and runs for tests of attention."""

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orchestrator.data.collate import Counts, PackedCollator, PairBatch, PreferenceCollator
from orchestrator.data.pairs import PairRow
from orchestrator.dpo.step import METRICS, PairStep, StepOutput
from orchestrator.models.attention import (
    use_packed_attention,
)
from orchestrator.models.fused import fuse
from orchestrator.models.reference import Reference
from orchestrator.settings.loss import DpoSpec, LossType
from orchestrator.settings.model import AttentionName
from support.tiny_parts import PAD, data_spec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 1},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "mistral": {**LLAMA, "sliding_window": None},
    "gemma": {**LLAMA, "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": GPT2,
}


def config_of(kind: str, **more: Any) -> Any:
    return AutoConfig.for_model(
        kind, vocab_size=300, initializer_range=0.2, **{**KINDS.get(kind, {}), **more}
    )


@lru_cache(maxsize=64)
def random_model(kind: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(kind), dtype=dtype).train()
    with torch.no_grad():
        # norms of 1 and biases of 0 would hide much
        for vector in [p for p in model.parameters() if p.ndim < 2]:
            vector += torch.linspace(-0.3, 0.3, vector.numel(), dtype=dtype)
    fuse(model)
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the weights; deepcopy would copy the norms that fuse has bound to the first one."""
    other = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype).train()
    other.load_state_dict(model.state_dict())
    fuse(other)
    return other


def step_of(
    kind: str,
    dtype: torch.dtype,
    kernel: AttentionName = "padded",
    recompute: bool = False,
    loss: LossType = "sigmoid",
) -> PairStep:
    policy, reference = (twin(random_model(kind, dtype, seed)) for seed in (0, 1))
    for model in (policy, reference):
        if kernel != "padded":
            use_packed_attention(model, kernel)
    if recompute:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.disable_input_require_grads()
    return PairStep(policy, Reference(reference), DpoSpec(beta=0.3, loss_type=loss))


kept_step = lru_cache(maxsize=256)(step_of)


class StepNumbers(NamedTuple):
    output: StepOutput
    gradient: torch.Tensor


def run(step: PairStep, batch: PairBatch) -> StepNumbers:
    step.zero_grad()
    output: StepOutput = step(batch, Counts(7, 1))
    output.loss.backward()
    return StepNumbers(output, gradient(step))


def gradient(step: PairStep) -> torch.Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in step.parameters()
        ]
    )


def both(rows: list[PairRow], keep_last: int | None = None) -> tuple[PairBatch, PairBatch]:
    """(padded, packed)."""
    data = data_spec(truncation="keep_end", max_length=keep_last) if keep_last else data_spec()
    return PreferenceCollator(PAD, data)(rows), PackedCollator(data)(rows)


WINS = METRICS.index("rewards/accuracies")


def assert_equal(packed: StepNumbers, padded: StepNumbers) -> None:
    for name in ("loss", "logps", "ref_logps", "metric_sums"):
        left, right = getattr(packed.output, name), getattr(padded.output, name)
        allowed = torch.full_like(right, 1e-10)
        if name == "metric_sums":
            allowed[WINS, 0] += ties(padded.output)
        assert ((left - right).abs() <= allowed + 1e-10 * right.abs()).all(), (
            name,
            (left - right).abs().max(),
        )
    assert torch.allclose(packed.gradient, padded.gradient, rtol=1e-10, atol=1e-10)


def ties(output: StepOutput) -> int:
    """Return the number of pairs with equal rewards: rounding, which differs between CPUs, decides
    who wins.
    """
    chosen, rejected = (output.logps - output.ref_logps).chunk(2)
    return int(((chosen - rejected).abs() <= 1e-10).sum())


def far(left: torch.Tensor, right: torch.Tensor) -> float:
    """Relative to the norm of the right one."""
    return float((left - right).norm() / right.norm().clamp_min(1e-12))


def pair(prompt: int, chosen: list[int], rejected: list[int]) -> PairRow:
    return {
        "pair_id": 1,
        "prompt_ids": [40 + i % 200 for i in range(prompt)],
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }


# What each of these does to a batch is not to be left to chance.
EDGES = [
    pair(0, [5, 6, 7], [8, 9]),  # the first token of each completion has none before it
    pair(0, [5, 6, 7], [5, 6, 9, 10]),  # no prompt, and yet something is shared
    pair(4, [5], [6]),  # one-token completions: only the prompt's last token scores
    pair(3, [5, 6], [5, 6, 7, 8]),  # chosen a prefix of rejected
    pair(3, [5, 6, 7], [5]),  # rejected a prefix of chosen: its own run is empty
    pair(12, [5, 6, 7], [8, 9, 10, 11, 12]),  # cut to 6, the two keep different parts of the prompt
    pair(9, [7, 5, 6, 1, 2, 3], [8, 9]),  # cut to 6, the chosen one keeps nothing of the prompt
    pair(2, [5, 6, 7, 8, 9, 10, 11], [1, 6, 7, 8, 9, 10, 11]),  # cut to 6, the two are the same
]


def layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(
        module for module in model.base_model.modules() if isinstance(module, torch.nn.ModuleList)
    )
