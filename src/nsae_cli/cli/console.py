"""Results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, cast

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

from nsae_cli import catalogue
from nsae_cli.reporter import Task

#: Width of tables where stdout is no terminal (a file, a pipe, CI).
_PLAIN_WIDTH = 110
#: Width of lists there: one line per entry, for grep and cut.
_LIST_WIDTH = 10_000
#: Seconds between two plain progress lines where stderr is no terminal; with --verbose.
_PLAIN_SECONDS, _VERBOSE_SECONDS = 10.0, 1.0


class _Stderr(io.TextIOBase):
    """stderr for remarks. A terminal that has gone, or a full disk behind it, must not end work."""

    def __init__(self) -> None:
        self._stream = sys.stderr  # as it is now: while a bar is shown rich puts a stream of its own there

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # rich asks whether it can draw lines
        return self._stream.encoding or "utf-8"


class ConsoleReporter:
    """Implements `reporter.Reporter` on a terminal, or with plain lines where there is none.

    Args:
        verbosity: -1 quiet (warnings only), 0 normal, 1 with the time elapsed and progress every second.
    """

    def __init__(self, verbosity: int = 0) -> None:
        self._quiet, self._verbose = verbosity < 0, verbosity > 0
        self._console = Console(file=cast("IO[str]", _Stderr()), highlight=False, soft_wrap=True, force_jupyter=False)
        self._started = time.monotonic()

    def note(self, text: str) -> None:
        if not self._quiet:
            stamp = f"[{time.monotonic() - self._started:7.1f} s] " if self._verbose else ""
            self._console.print(stamp + text, style="dim", markup=False)

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
            seconds = _VERBOSE_SECONDS if self._verbose else _PLAIN_SECONDS
            task = _PlainTask(self._console, description, total, unit, seconds)
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
    """A line every `every` seconds while there is news, and one at the end."""

    def __init__(self, console: Console, description: str, total: int | None, unit: str, every: float) -> None:
        self._console, self._description, self._total, self._unit = console, description, total, unit
        self._every = every
        self._fields: dict[str, str] = {}
        self._done, self._started = 0, time.monotonic()
        self._said = self._started

    def advance(self, amount: int, **fields: str) -> None:
        self._done += amount
        self._fields |= fields
        if self._done and time.monotonic() - self._said >= self._every:
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


def print_result(renderable: RenderableType, *, one_line_each: bool = False) -> None:
    """Prints a table or text on stdout.

    Args:
        renderable: what to print.
        one_line_each: a list: where stdout is no terminal its lines are never folded.

    Raises:
        ResourceError: stdout cannot be written.
    """
    if sys.stdout.isatty():
        with written_to_stdout():
            Console(highlight=False).print(renderable)
        return
    width = _LIST_WIDTH if one_line_each else max(_PLAIN_WIDTH, shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns)
    # In a notebook rich would show the text itself, in a cell output of its own, and colour what is captured here.
    console = Console(width=width, highlight=False, file=io.StringIO(), force_jupyter=False)
    with console.capture() as capture:
        console.print(renderable)
    # rich fills lines up with spaces, which a file need not keep.
    print_text("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_json(value: Any) -> None:
    """Prints exactly one JSON object on stdout, in ASCII: it is read by programs, under any encoding."""
    print_text(json.dumps(value, indent=2, allow_nan=False))


def print_text(text: str) -> None:
    """Prints plain text on stdout.

    Raises:
        ResourceError: stdout cannot be written.
    """
    with written_to_stdout():
        print(text)


@contextlib.contextmanager
def written_to_stdout() -> Iterator[None]:
    """For what writes to stdout: hands it on at once and says so if that fails.

    Raises:
        ResourceError: stdout cannot be written; a reader that has gone is a BrokenPipeError.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise catalogue.STDOUT_FAILED(
            f"the result could not be written to stdout ({error.strerror or error}); "
            f"what the command made is complete, run it again for the output"
        ) from error
