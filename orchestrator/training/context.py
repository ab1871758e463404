"""The context in which every part of a run is built on a rank."""

from dataclasses import dataclass

from orchestrator.engines.precision import is_16_bit, resolved
from orchestrator.settings.precision import Precision
from orchestrator.settings.run import RunSpec
from orchestrator.training.rundir import RunDir
from orchestrator.training.session import Session
from orchestrator.world import World


@dataclass(frozen=True)
class RunContext:
    """The settings of a run, this rank, its launcher and the run directory."""

    spec: RunSpec
    world: World
    session: Session
    run_dir: RunDir

    @property
    def precision(self) -> Precision:
        """Return the precision of the settings on the device of this rank."""
        return resolved(self.spec.precision, self.world.device)

    @property
    def has_16_bit_weights(self) -> bool:
        """Return whether the forward pass has 16-bit weights, and not only 16-bit arithmetic."""
        return is_16_bit(self.precision) and self.spec.engine.traits.holds_16_bit_weights
