"""One flag that SIGINT and SIGTERM set and every long loop polls.

The command line installs the handlers; work below it calls `stop_requested()` at points where it can end cleanly, saves
what it has and raises `errors.Interrupted`. A second signal ends the process at once: what is durable stays durable.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from nsae_cli.errors import Interrupted

_signum: int | None = None


def install_handlers() -> None:
    """Routes SIGINT and SIGTERM to the flag (main thread only)."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _handle)


def _handle(signum: int, frame: FrameType | None) -> None:
    global _signum
    if _signum is not None:
        os._exit(128 + signum)
    _signum = signum


def stop_requested() -> int | None:
    """The signal that asked the run to end, or None."""
    return _signum


def stop_if_requested(message: str) -> None:
    """Ends the work here if a signal asked for it.

    Args:
        message: what was saved and how to go on.

    Raises:
        Interrupted: a signal asked the run to end.
    """
    if _signum is not None:
        raise Interrupted(_signum, message)


def clear() -> None:
    """Forgets an earlier signal: for a process that starts another command (tests, Python callers)."""
    global _signum
    _signum = None
