"""The position in a run, which a checkpoint saves and a resumed run restores."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """The position in a run; every field is a key of a checkpoint's meta.json."""

    step: int = 0  # optimizer steps taken
    pairs_seen: int = 0
    tokens_seen: float = 0.0
    losses_seen: tuple[float, float] = (0.0, 0.0)  # sum and count of the logged losses
    evaluated_at: int = -1  # the step after which the sets were last evaluated
    finishing: bool = False  # a callback requested the end of training
    ending_epoch: bool = False  # a callback requested to skip the rest of the epoch
    epochs_ended: list[int] = field(default_factory=list)  # steps after which an epoch ended early
    skipped_in_a_row: int = 0  # batches without an update, since the last one
    # sets whose loss was not finite in the evaluation after `evaluated_at`
    broken_sets: list[str] = field(default_factory=list)
    # an evaluation that a stop has interrupted: the metrics of the sets before, by their names
    evaluating: dict[str, dict[str, float]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a checkpoint."""
        return asdict(self)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the fields from a checkpoint, which may have other keys too; one of an older
        version lacks some.
        """
        for each in fields(self):
            setattr(self, each.name, saved.get(each.name, getattr(self, each.name)))
        total, count = self.losses_seen  # a list in JSON
        self.losses_seen = (total, count)
