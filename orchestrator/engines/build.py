"""Settings -> the engine they name; each engine's libraries are imported only where it is the one."""

from orchestrator.engines.stepping import SteppingEngine
from orchestrator.settings.spec import EngineSpec


def engine_class(settings: EngineSpec) -> type[SteppingEngine]:
    """The kind of engine; what it is made of, SteppingEngine says."""
    if settings.kind == "deepspeed":
        from orchestrator.engines.deepspeed import DeepSpeedEngine as Kind
    elif settings.kind == "fsdp":
        from orchestrator.engines.fsdp import FsdpEngine as Kind
    else:
        from orchestrator.engines.ddp import DdpEngine as Kind
    return Kind
