"""Name ranks that are slower than the others in their own work, by their heartbeats."""

from collections import Counter
from collections.abc import Iterable
from statistics import median

from orchestrator.training.heartbeat import Heartbeat

STEPS = 20  # of a comparison
TIMES_IN_A_ROW = 2
FACTOR = 2.0  # times the median of the other ranks
SHARE = 0.2  # of the time of a step: less does not matter


class Stragglers:
    """Compares the seconds per step of each rank's own work since the last comparison."""

    def __init__(self) -> None:
        self._before: dict[int, Heartbeat] = {}
        self._slow: Counter[int] = Counter()  # comparisons in a row in which a rank was slow
        self._named: set[int] = set()

    def compare(self, beats: Iterable[Heartbeat]) -> list[str]:
        """Return a line for each rank that is newly a straggler."""
        newest = {beat.rank: beat for beat in beats}
        if self._before.keys() != newest.keys():
            self._before = newest
            return []
        steps = {rank: beat.step - self._before[rank].step for rank, beat in newest.items()}
        if min(steps.values(), default=0) < STEPS:
            return []
        before, self._before = self._before, newest
        work = {rank: _per_step(before[rank], newest[rank]) for rank in newest}
        spans = [(newest[rank].time - before[rank].time) / steps[rank] for rank in newest]
        lines: list[str] = []
        for rank, own in work.items():
            others = {
                name: median(work[other].get(name, 0.0) for other in work if other != rank)
                for name in own
            }
            more = {name: own[name] - others[name] for name in own}
            typical = median(sum(work[other].values()) for other in work if other != rank)
            excess = sum(own.values()) - typical
            is_slow = sum(own.values()) > FACTOR * typical and excess > SHARE * median(spans)
            self._slow[rank] = self._slow[rank] + 1 if is_slow else 0
            if self._slow[rank] >= TIMES_IN_A_ROW and rank not in self._named:
                self._named.add(rank)
                lines.append(_line(newest[rank], sum(own.values()), typical, more))
        return lines


def _per_step(before: Heartbeat, after: Heartbeat) -> dict[str, float]:
    """Return the seconds of each kind of work in a step."""
    steps = after.step - before.step
    return {
        name: (seconds - before.seconds.get(name, 0.0)) / steps
        for name, seconds in after.seconds.items()
    }


def _line(beat: Heartbeat, own: float, typical: float, more: dict[str, float]) -> str:
    """Return the line that names a straggler. more: seconds more than others, by kind of work."""
    slowest = max(more, key=lambda name: more[name])
    code = f"; of user code, {beat.slowest_code} takes the most" if beat.slowest_code else ""
    return (
        f"rank {beat.rank} on {beat.host}, step {beat.step}, {slowest}: is slow, with {own:.3g} s "
        f"of own work in a step where other ranks take {typical:.3g} s{code}; all ranks wait for "
        "it: check this node, or that code"
    )
