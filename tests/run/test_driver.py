"""What the driver decides without starting Ray; whole runs on Ray are in tests/quickstart and tests/faults."""

import pytest

from orchestrator.run.driver import _placeable


@pytest.mark.parametrize(("placement", "fits"), [("PACK", 5), ("SPREAD", 5), ("STRICT_PACK", 3), ("STRICT_SPREAD", 2)])
def test_placement_decides_how_many_workers_fit(placement: str, fits: int) -> None:
    assert _placeable([3, 0, 2], placement) == fits
    assert _placeable([], placement) == 0
