"""Select the engine class that the settings name; each engine's libraries are imported only if it
is selected.
"""

from orchestrator.engines.stepping import SteppingEngine
from orchestrator.settings.engine import EngineSpec


def engine_class(settings: EngineSpec) -> type[SteppingEngine]:
    """Return the engine class of the settings; see SteppingEngine for its arguments."""
    if settings.kind == "deepspeed":
        from orchestrator.engines.deepspeed import DeepSpeedEngine as Kind
    elif settings.kind == "fsdp":
        from orchestrator.engines.fsdp import FsdpEngine as Kind
    else:
        from orchestrator.engines.ddp import DdpEngine as Kind
    return Kind
