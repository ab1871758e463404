"""Stop a command before its run begins: imports and checks precede the handlers of a run."""

import signal
from types import FrameType

# USR1: sent by Slurm before a job's time limit; HUP: the terminal or the connection was closed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StoppedEarly(BaseException):
    """Signal that arrived before the run began, so that there is nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped before it began (received {self.name}); the same command starts it"


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run; without HUP if nohup has made this process ignore it."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


def stop_early(number: int, _: FrameType | None) -> None:
    """Handle a stop signal: unwind this process; a second signal kills it."""
    reset()
    raise StoppedEarly(number)


def install() -> None:
    """Raise StoppedEarly in this thread, the main one, when a stop signal arrives."""
    for number in stop_signals():
        signal.signal(number, stop_early)


def leave() -> None:
    """Let stop signals end the process, as by default, if `install` was called before."""
    if signal.getsignal(signal.SIGTERM) == stop_early:
        reset()


def reset() -> None:
    """Let stop signals end the process, as by default."""
    for number in stop_signals():
        is_int = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_int else signal.SIG_DFL)
