"""Settings -> the engine they name; each engine's libraries are imported only where it is the one."""

import torch

from orchestrator.engines.stepping import SteppingEngine
from orchestrator.settings.spec import EngineSpec, Precision
from orchestrator.world import World


def build_engine(
    settings: EngineSpec,
    world: World,
    precision: Precision,
    max_grad_norm: float | None,
    weight_decay: float,
    frozen_dtype: torch.dtype | None = None,
) -> SteppingEngine:
    """The engine, before it wraps anything. precision: resolved, not auto. frozen_dtype: see SteppingEngine."""
    if settings.kind == "deepspeed":
        from orchestrator.engines.deepspeed import DeepSpeedEngine as Kind
    elif settings.kind == "fsdp":
        from orchestrator.engines.fsdp import FsdpEngine as Kind
    else:
        from orchestrator.engines.ddp import DdpEngine as Kind
    return Kind(settings, world, precision, max_grad_norm, weight_decay, frozen_dtype)
