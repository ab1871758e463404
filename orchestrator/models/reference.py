"""The frozen judge: the model whose log-probs the policy's are measured against.

Legend: 2B sequences, R rows, T tokens, H hidden size.
"""

import copy
import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.data.collate import PairBatch
from orchestrator.models.logps import sequence_logps
from orchestrator.models.policy import config_at, load_model
from orchestrator.settings.spec import ModelSpec, ReferenceSpec, UserError
from orchestrator.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reference:
    """A frozen model of its own. Not an nn.Module on purpose: whoever holds it registers no parameter."""

    capture_layer: int | None = None  # a copy needs no hidden state of the policy

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.requires_grad_(False).eval()

    def __call__(self, batch: PairBatch, captured: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probs [2B], fp64. `captured` [R, T, H] is what entered capture_layer in the policy; unused here."""
        return sequence_logps(self.model, batch)


def reference_identity(model: "PreTrainedModel", world: World) -> dict[str, Any]:
    """What its log-probs depend on: its config and the sha256 of its weights, each hashed by one rank. Collective."""
    tensors = sorted(model.state_dict().items())
    mine = [
        hashlib.sha256(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()
        for _, tensor in tensors[world.rank :: world.size]
    ]
    digests = world.gather(mine)
    whole = [(name, digests[i % world.size][i // world.size]) for i, (name, _) in enumerate(tensors)]
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    config = json.loads(json.dumps(config, sort_keys=True, default=str))
    return {"weights": hashlib.sha256(json.dumps(whole).encode()).hexdigest(), "config": config}


def check_reference(spec: ReferenceSpec, policy_config: Any) -> None:
    """Refuse another model as reference, before any weight is loaded, whose vocabulary is not the policy's.

    Raises:
        UserError: its config cannot be loaded, or its vocabulary has another size.
    """
    if spec.path is None:
        return
    sizes = [c.get_text_config().vocab_size for c in (policy_config, config_at("reference.path", spec.path))]
    if sizes[0] != sizes[1]:
        raise UserError(
            "reference.path",
            spec.path,
            f"has a vocabulary of {sizes[1]} tokens, the policy of {sizes[0]}",
            "take a reference with the policy's tokenizer",
        )


def build_reference(spec: ReferenceSpec, model: ModelSpec, policy: "PreTrainedModel") -> Reference:
    """A frozen copy of the policy as it stands (before any wrapping), or of the model at reference.path.

    Raises:
        UserError: the other model cannot be loaded.
    """
    if spec.path is None:
        return Reference(copy.deepcopy(policy))
    other = load_model("reference.path", spec.path, model.disable_dropout, policy.dtype)
    return Reference(other.to(policy.device))  # pyright: ignore[reportArgumentType]
