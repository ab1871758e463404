"""Debugger prompt at breakpoint() and, with --pdb, after an unexpected exception."""

import os
import pdb
import signal
import sys
import threading
from bdb import BdbQuit
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.settings.errors import UserError, type_and_message
from orchestrator.training.callbacks.console import ConsoleCallback
from orchestrator.world import World


class Prompt(pdb.Pdb):
    """pdb with the terminal to itself: no progress bar, and Ctrl-C ends a command, not the run."""

    def __init__(self) -> None:
        ConsoleCallback.give_way()  # first: a progress bar has replaced sys.stdout
        # pdb's own handler would stay, and Ctrl-C could no longer stop the run
        super().__init__(nosigint=True)

    def cmdloop(self, intro: str | None = None) -> None:
        """Read and execute commands until one continues the program."""
        if threading.current_thread() is not threading.main_thread():
            return super().cmdloop(intro)  # only the main thread handles signals
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            super().cmdloop(intro)
        finally:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def debugger(world: World, post_mortem: bool) -> Iterator[None]:
    """Make breakpoint() open a Prompt, unless PYTHONBREAKPOINT is set.

    post_mortem: also open one for an exception, at the line that raised it, before it propagates;
        for a UserError only if user code raised its cause. Of several ranks, the first that fails
        opens it, and the others wait.

    Raises:
        KeyboardInterrupt: the user quit at a breakpoint.
    """
    if world.size > 1:
        # a rank at a breakpoint could not remove the progress bar of another
        ConsoleCallback.give_way()
    hook = sys.breakpointhook
    if "PYTHONBREAKPOINT" not in os.environ:
        sys.breakpointhook = _open_prompt
    try:
        yield
    except BdbQuit:
        raise KeyboardInterrupt from None
    except Exception as error:
        if post_mortem:
            _examine(error, world)
        raise
    finally:
        sys.breakpointhook = hook


def _open_prompt(*, header: str | None = None) -> None:
    prompt = Prompt()
    if header is not None:
        prompt.message(header)
    prompt.set_trace(sys._getframe().f_back)


def _examine(error: Exception, world: World) -> None:
    """Open a prompt at the line that raised, on the first rank that failed.

    The others fail because of it, or alike.
    """
    with world.first_to_arrive("failure") as is_first:
        examined = error.__cause__ if isinstance(error, UserError) else error
        if not is_first or examined is None:
            return
        prompt = Prompt()
        rank = f"rank {world.rank}: " if world.size > 1 else ""
        prompt.message(f"\n{rank}{type_and_message(examined)}")
        prompt.reset()
        prompt.interaction(None, examined.__traceback__)
