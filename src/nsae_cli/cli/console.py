"""Results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nsae_cli.reporter import Task
from nsae_cli.store.commit import to_json

#: Width of tables where stdout is no terminal (a file, a pipe, CI).
_PLAIN_WIDTH = 110
#: Seconds between two plain progress lines where stderr is no terminal.
_PLAIN_SECONDS = 10.0


class ConsoleReporter:
    """Implements `reporter.Reporter` on a terminal, or with plain lines where there is none.

    Args:
        verbosity: -1 quiet (warnings only), 0 normal.
    """

    def __init__(self, verbosity: int = 0) -> None:
        self._quiet = verbosity < 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    @contextlib.contextmanager
    def task(self, description: str, total: int | None, unit: str) -> Iterator[Task]:
        if self._quiet:
            yield _QuietTask()
        elif self._console.is_terminal:
            with _bar(self._console) as progress:
                yield _BarTask(progress, progress.add_task(description, total=total, unit=unit, fields=""), unit)
        else:
            task = _PlainTask(self._console, description, total, unit)
            yield task
            task.finish()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[fields]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _QuietTask:
    def advance(self, amount: int, **fields: str) -> None:
        pass


class _BarTask:
    def __init__(self, progress: Progress, task: TaskID, unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit
        self._fields: dict[str, str] = {}
        self._done, self._started = 0, time.monotonic()

    def advance(self, amount: int, **fields: str) -> None:
        self._fields |= fields
        self._done += amount
        rate = self._done / max(1e-9, time.monotonic() - self._started)
        shown = " ".join([f"{rate:,.0f}/s", *(f"{key} {value}" for key, value in self._fields.items())])
        self._progress.update(self._task, advance=amount, fields=shown)


class _PlainTask:
    """A line at the start's first news, then one every few seconds, and one at the end."""

    def __init__(self, console: Console, description: str, total: int | None, unit: str) -> None:
        self._console, self._description, self._total, self._unit = console, description, total, unit
        self._fields: dict[str, str] = {}
        self._done, self._started = 0, time.monotonic()
        self._said = self._started

    def advance(self, amount: int, **fields: str) -> None:
        self._done += amount
        self._fields |= fields
        if time.monotonic() - self._said >= _PLAIN_SECONDS:
            self._say()

    def finish(self) -> None:
        """The last line, with the total time."""
        if self._done:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._started
        rate = self._done / max(seconds, 1e-9)
        parts = [f"{self._description}: {self._done:,} {self._unit}"]
        if self._total:
            parts = [f"{self._description}: {self._done / self._total:4.0%} of {self._total:,} {self._unit}"]
        parts.append(f"{rate:,.0f}/s")
        if self._total and self._done < self._total:
            parts.append(f"{(self._total - self._done) / rate:,.0f} s left")
        else:
            parts.append(f"{seconds:,.1f} s")
        parts += [f"{key} {value}" for key, value in self._fields.items()]
        self._console.print(", ".join(parts), style="dim", markup=False)


def print_result(renderable: RenderableType) -> None:
    """Prints a table or text on stdout."""
    width = None if sys.stdout.isatty() else max(_PLAIN_WIDTH, shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns)
    Console(width=width, highlight=False).print(renderable)


def print_json(value: Any) -> None:
    """Prints exactly one JSON object on stdout."""
    sys.stdout.write(to_json(value) + "\n")
