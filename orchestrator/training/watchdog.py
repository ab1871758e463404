"""Notice a rank that hangs, name it, and end the attempt: a thread of each rank watches.

The rank beats at each place of its loop, which takes no lock and writes no file. Its thread
publishes the newest beat every second. Once the rank has not beaten for longer than its phase may
take, its thread reads the heartbeats of all ranks; if one that all others wait for has exceeded its
own bound, every rank writes its stacks, one line names that rank, and the attempt ends.
"""

import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from orchestrator.settings.run import RunSpec
from orchestrator.training.heartbeat import (
    PHASES,
    PLACE,
    Heartbeat,
    Observed,
    Observer,
    Phase,
    bound_of,
    hang_line,
    hung_ranks,
    reported_hang,
)
from orchestrator.training.rundir import RunDir
from orchestrator.training.stacks import write_own_stacks, write_stacks_of
from orchestrator.training.stragglers import Stragglers
from orchestrator.user_time import USER_TIME
from orchestrator.world import World

TICK_S = 1.0
SUSPENDED_S = 3.0  # a tick that takes longer shows that this process was suspended
COMPARE_S = 10.0  # between two comparisons of the ranks' own work
STACKS_S = 10.0  # seconds that other ranks get to write their stacks
BUSY_SHARE = 0.2  # of a core, from which on a process computes
OWN_WORK: tuple[Phase, ...] = ("collate", "forward")
"""Phases in which a rank waits for no other; `forward` unless it gathers weights."""
WAITING: tuple[Phase, ...] = ("fill", "forward", "backward", "reduce", "update", "evaluate", "save")
"""Phases in which a rank may wait in a collective."""
WAITED_OUT = 0.75  # of cluster.collective_timeout_s: the peer is named before the collective raises
NUMBERS: dict[Phase, int] = {phase: number for number, phase in enumerate(PHASES)}
PROMPTS = ("bdb", "cmd", "pdb")  # modules of debuggers with a prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Beat:
    """The place of a rank."""

    step: int  # steps taken
    phase: Phase
    index: int
    order: int  # among the beats of this step
    at: float  # monotonic seconds


class Watchdog:
    """The beats of one rank, and the thread that publishes and watches them.

    on_hang: called by the thread with the line that names the hung rank, and whether this rank is
        the one that reports it; it ends the process.
    ends_hangs: if False, this only publishes.
    """

    def __init__(
        self,
        run_dir: RunDir,
        world: World,
        spec: RunSpec,
        on_hang: Callable[[str, bool], None],
        ends_hangs: bool = True,
    ) -> None:
        self.run_dir, self.rank, self.size = run_dir, world.rank, world.size
        self.timeout_s: float = spec.cluster.hang_timeout_s if ends_hangs else 0
        self.on_hang = on_hang
        self.waited_out_s = WAITED_OUT * spec.cluster.collective_timeout_s
        self.forward_is_collective = spec.engine.shards_weights
        self._beat = Beat(0, "start", 0, 0, time.monotonic())
        self._longest: dict[Phase, float] = {}
        self._work: dict[str, float] = dict.fromkeys((*OWN_WORK, "callbacks"), 0.0)
        self._user_s = USER_TIME.total
        self._paused_s = 0.0  # of the time since the beat
        self._cpu = (self._beat, time.process_time())  # when that beat was first seen
        self._memory_file = os.memfd_create("place") if hasattr(os, "memfd_create") else -1
        if self._memory_file >= 0:
            os.truncate(self._memory_file, PLACE.size)
        # read by other processes of this machine where this one is stopped
        self._memory = mmap.mmap(self._memory_file, PLACE.size)
        self._compared = self._looked = 0.0
        self._stopped = threading.Event()
        self._observer = Observer(run_dir, world.size)
        self._stragglers = Stragglers()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # --- the thread that trains -------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Return the steps taken at the newest beat."""
        return self._beat.step

    def beat(self, step: int, phase: Phase, index: int = 0) -> None:
        """Report where this rank is; `step`: steps taken."""
        now, last, user_s = time.monotonic(), self._beat, USER_TIME.total
        took = now - last.at - self._paused_s
        longest = self._longest.get(last.phase, 0.0)
        # more than the bound: this process was suspended
        if longest < took < bound_of(last.phase, self.timeout_s, longest, is_busy=True):
            self._longest[last.phase] = took
        if last.phase == "collate" or (last.phase == "forward" and not self.forward_is_collective):
            self._work[last.phase] += took
        else:
            self._work["callbacks"] += user_s - self._user_s
        self._user_s = user_s
        order = last.order + 1 if step == last.step else 0
        PLACE.pack_into(self._memory, 0, step, NUMBERS[phase], index, order)
        self._paused_s, self._beat = 0.0, Beat(step, phase, index, order, now)

    def start(self) -> None:
        """Publish the first beat, and start the thread."""
        self._publish(time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and publish the last beat."""
        self._stopped.set()
        self._thread.join(SUSPENDED_S)  # it may wait for a file system
        if not self._thread.is_alive():
            self._publish(time.monotonic())
            if self._memory_file >= 0:
                os.close(self._memory_file)

    # --- the watchdog's thread --------------------------------------------------------------------

    def _watch(self) -> None:
        clock = Clock()
        while not self._stopped.wait(TICK_S):
            is_at_prompt = at_prompt()
            self._paused_s += clock.tick(is_at_prompt)
            heartbeat = self._publish(time.monotonic(), is_at_prompt)
            if self.rank == 0 and self.size > 1:
                self._compare(heartbeat, clock.now)
            try:
                if self.timeout_s and self._ends_hang(heartbeat, clock):
                    return
            except OSError as error:  # the file system's; the next tick tries again
                logger.debug("%s", error)

    def _compare(self, own: Heartbeat, now: float) -> None:
        """Print a line for each new straggler, from time to time."""
        if now - self._compared > COMPARE_S:
            self._compared = now
            for line in self._stragglers.compare(each.beat for each in self._look(own, now)):
                logger.warning("%s", line)

    def _ends_hang(self, own: Heartbeat, clock: "Clock") -> bool:
        """Handle a hang that another process reports, or that shows now; return whether there was
        one.
        """
        if self.run_dir.hang.exists():
            self._follow()
            return True
        is_due = clock.now - self._looked > min(10 * TICK_S, self.timeout_s / 10)
        if not (is_due and own.age > own.bound):
            return False
        self._looked = clock.now
        return self._reports(own, clock)

    def _publish(self, now: float, is_at_prompt: bool = False) -> Heartbeat:
        """Write the heartbeat file, and return its content."""
        beat = self._beat
        if self._cpu[0] is not beat:
            self._cpu = beat, time.process_time()
        age = max(0.0, now - beat.at - self._paused_s)
        is_busy = time.process_time() - self._cpu[1] > BUSY_SHARE * max(age, TICK_S)
        longest = self._longest.get(beat.phase, 0.0)
        slowest = max(
            list(USER_TIME.seconds.items()), key=lambda item: item[1], default=(None, 0.0)
        )
        heartbeat = Heartbeat(
            rank=self.rank,
            step=beat.step,
            phase=beat.phase,
            index=beat.index,
            order=beat.order,
            age=round(age, 3),
            bound=bound_of(beat.phase, self.timeout_s or float("inf"), longest, is_busy),
            timeout_s=self.timeout_s or float("inf"),
            memory=self._memory_file,
            user_code=USER_TIME.running,
            at_prompt=is_at_prompt,
            seconds={name: round(seconds, 6) for name, seconds in self._work.items()},
            slowest_code=slowest[0],
            time=time.time(),
            pid=os.getpid(),
            host=os.uname().nodename,
        )
        with suppress(OSError):  # a full disk: the checkpoint reports it
            # closed each time: NFS shows it to other machines only then
            file = os.open(self.run_dir.heartbeat(self.rank), os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.write(file, heartbeat.encoded())
            finally:
                os.close(file)
        return heartbeat

    def _look(self, own: Heartbeat, now: float) -> list[Observed]:
        """Return what is known of all ranks; of this one also if its file cannot be written."""
        others = [each for each in self._observer.look(now) if each.beat.rank != self.rank]
        return [*others, Observed(own, 0.0)]

    def _reports(self, own: Heartbeat, clock: "Clock") -> bool:
        """Report a hang, if there is one and no other rank reports it; return whether it did."""
        waited_out = own.phase in WAITING and own.age > self.waited_out_s
        hung = hung_ranks(self._look(own, clock.now), waited_out)
        if not hung:
            return False
        before = self._stacks_written()
        try:
            os.close(os.open(self.run_dir.hang, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False  # another rank reports it: the next tick follows it
        except OSError:
            logger.warning("%s cannot be written", self.run_dir.hang)
        write_own_stacks(self.run_dir.stacks(self.rank))
        responsive = {each.beat.rank for each in self._look(own, clock.now) if not each.is_silent}
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline and any(
            self._stacks_written()[rank] == before[rank] for rank in responsive
        ):
            time.sleep(TICK_S / 4)
        clock.tick()
        ranks = self._look(own, clock.now)
        write_stacks_of_silent(ranks, self.run_dir)
        line = hang_line(hung_ranks(ranks, waited_out) or hung, self.run_dir)
        with suppress(OSError):
            self.run_dir.hang.write_text(line + "\n")
        self.on_hang(line, True)
        return True

    def _stacks_written(self) -> list[int]:
        """Return when the stacks of each rank were written; 0: not yet."""
        paths = [self.run_dir.stacks(rank) for rank in range(self.size)]
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]

    def _follow(self) -> None:
        """End with the hang that another process reports, after writing this process's stacks."""
        write_own_stacks(self.run_dir.stacks(self.rank))
        deadline = time.monotonic() + 3 * STACKS_S
        while (line := reported_hang(self.run_dir)) is None and time.monotonic() < deadline:
            time.sleep(TICK_S / 4)
        self.on_hang(line or "another rank hangs", False)


class Clock:
    """Monotonic seconds of a thread that ticks, without those in which its process was
    suspended.
    """

    def __init__(self) -> None:
        self.now, self._ticked = 0.0, time.monotonic()

    def tick(self, is_paused: bool = False) -> float:
        """Advance to the present; return the seconds that do not count. is_paused: none count."""
        present = time.monotonic()
        gap, self._ticked = present - self._ticked, present
        if is_paused or gap > SUSPENDED_S:
            self.now += TICK_S
            return gap
        self.now += gap
        return 0.0


def at_prompt() -> bool:
    """Return whether a debugger is attached to this process, or waits in it for its user."""
    if "pydevd" in sys.modules:
        return True
    for frame in sys._current_frames().values():
        here: FrameType | None = frame
        while here is not None:
            if here.f_globals.get("__name__") in PROMPTS:
                return True
            here = here.f_back
    return False


@contextmanager
def watched(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Run a rank's watchdog, and publish at the end that the rank is done."""
    watchdog.start()
    try:
        yield watchdog
        watchdog.beat(watchdog.step, "done")
    finally:
        watchdog.stop()


def write_stacks_of_silent(ranks: Iterable[Observed], run_dir: RunDir) -> None:
    """Write the stacks of the processes of this machine that do not respond."""
    for beat in (each.beat for each in ranks if each.is_silent):
        if beat.host == os.uname().nodename:
            write_stacks_of(beat.pid, run_dir.stacks(beat.rank))


@contextmanager
def watched_from_outside(
    run_dir: RunDir, size: int, on_hang: Callable[[str, list[Observed]], None]
) -> Iterator[None]:
    """Watch the heartbeats of ranks in the process that started them: it notices when none of them
    responds any more, as then no rank can report it.

    on_hang: called once, in a thread, with the line that names them and all that have not ended.
    """
    ended = threading.Event()

    def watch() -> None:
        clock, observer = Clock(), Observer(run_dir, size)
        while not ended.wait(TICK_S):
            clock.tick()
            ranks = observer.look(clock.now)
            active = [each for each in ranks if each.beat.phase != "done"]
            if len(ranks) < size or not all(each.is_silent for each in active):
                continue
            if (hung := hung_ranks(active)) and not run_dir.hang.exists():
                write_stacks_of_silent(active, run_dir)
                line = hang_line(hung, run_dir)
                with suppress(OSError):
                    run_dir.hang.write_text(line + "\n")
                on_hang(line, active)
                return

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
