"""How work below `cli/` speaks to whoever started it, without knowing a terminal.

`cli.console` implements `Reporter` on stderr; `SilentReporter` is for Python callers and tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Task(Protocol):
    """A piece of work with a known or unknown length."""

    def advance(self, amount: int, **fields: str) -> None:
        """`amount` more units are done; `fields` (loss="0.31", …) are shown beside the bar."""


class Reporter(Protocol):
    """Where progress and remarks go. Results are returned, never reported."""

    def note(self, text: str) -> None:
        """A line that says what is being done and why."""

    def warn(self, text: str) -> None:
        """A line about something that the user should look at."""

    def task(self, description: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Task]:
        """Shows a progress bar (or plain lines) while the context is open."""


class _SilentTask:
    def advance(self, amount: int, **fields: str) -> None:
        pass


class SilentReporter:
    """Reports nothing."""

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    @contextlib.contextmanager
    def task(self, description: str, total: int | None, unit: str) -> Iterator[Task]:
        yield _SilentTask()
