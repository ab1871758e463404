"""Where a person takes over: the debugger at a breakpoint(), and where an exception was raised that nobody expected."""

import os
import pdb
import signal
import sys
import threading
from bdb import BdbQuit
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.settings.spec import UserError
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.world import World


class Prompt(pdb.Pdb):
    """Python's debugger with the terminal to itself: no bar is drawn there, and Ctrl-C ends the command that was
    typed, where it would otherwise ask the run to stop."""

    def __init__(self) -> None:
        ConsoleCallback.give_way()  # first: a bar has put a stream of its own in the place of sys.stdout
        super().__init__(nosigint=True)  # pdb's own handler would stay, and a stop could no longer be asked for

    def cmdloop(self, intro: str | None = None) -> None:
        """Read and obey commands until one goes on."""
        if threading.current_thread() is not threading.main_thread():
            return super().cmdloop(intro)  # signals are the main thread's
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            super().cmdloop(intro)
        finally:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def debugger(world: World, post_mortem: bool) -> Iterator[None]:
    """Let breakpoint() open a Prompt, unless PYTHONBREAKPOINT says otherwise.

    post_mortem: let any exception but a refusal open one too, at the line that raised it, before it goes on; a refusal
    where a user's code has raised. Of several ranks the first that fails does so; the others wait for it.

    Raises:
        KeyboardInterrupt: someone quit at a breakpoint.
    """
    if world.size > 1:
        ConsoleCallback.give_way()  # a rank that stops could not take down the bar of another
    hook = sys.breakpointhook
    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _at_breakpoint
    try:
        yield
    except BdbQuit:
        raise KeyboardInterrupt from None
    except Exception as error:
        if post_mortem:
            _look_at(error, world)
        raise
    finally:
        sys.breakpointhook = hook


def _at_breakpoint(*, header: str | None = None) -> None:
    prompt = Prompt()
    if header is not None:
        prompt.message(header)
    prompt.set_trace(sys._getframe().f_back)


def _look_at(error: Exception, world: World) -> None:
    """The prompt at the line that raised it, on the rank that failed first: peers fail because of it, or alike."""
    with world.first_alone("failure") as is_first:
        looked_at = error.__cause__ if isinstance(error, UserError) else error
        if not is_first or looked_at is None:
            return
        prompt = Prompt()
        rank = f"rank {world.rank}: " if world.size > 1 else ""
        prompt.message(f"\n{rank}{type(looked_at).__name__}: {looked_at}")
        prompt.reset()
        prompt.interaction(None, looked_at.__traceback__)
