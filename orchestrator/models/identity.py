"""Identify a model by what its log-probs depend on: its config and the hash of its weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from orchestrator.world import World

# Keys of a config that do not affect log-probs.
NOT_IDENTIFYING = ("_name_or_path", "transformers_version")


def identity_of(
    tensors: dict[str, torch.Tensor],
    config: Any,
    world: World,
    types: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:
    """Return what a model's log-probs depend on: its config and the sha256 of its weights.
    Collective: each rank hashes a part of the weights.

    types: dtypes of the weights that an engine will cast (see types_when_cut); they are hashed in
    these.
    """
    named = sorted(tensors.items())
    mine: list[str] = []
    for name, tensor in named[world.rank :: world.size]:
        tensor = tensor.to((types or {}).get(name, tensor.dtype))
        content: Any = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        mine.append(hashlib.sha256(content).hexdigest())
    digests = world.gather(mine)
    whole = [(name, digests[i % world.size][i // world.size]) for i, (name, _) in enumerate(named)]
    in_config = {k: v for k, v in config.to_dict().items() if k not in NOT_IDENTIFYING}
    in_config = json.loads(json.dumps(in_config, sort_keys=True, default=str))
    return {"weights": hashlib.sha256(json.dumps(whole).encode()).hexdigest(), "config": in_config}
