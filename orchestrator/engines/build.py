"""Select the engine class that the settings name."""

from orchestrator.engines.ddp import DdpEngine
from orchestrator.engines.deepspeed import DeepSpeedEngine
from orchestrator.engines.fsdp import FsdpEngine
from orchestrator.engines.stepping import SteppingEngine
from orchestrator.settings.engine import EngineSpec

ENGINES: dict[str, type[SteppingEngine]] = {
    "ddp": DdpEngine,
    "fsdp": FsdpEngine,
    "deepspeed": DeepSpeedEngine,  # imports the library when it wraps a module
}


def engine_class(settings: EngineSpec) -> type[SteppingEngine]:
    """Return the engine class of the settings; see SteppingEngine for its arguments."""
    return ENGINES[settings.kind]
