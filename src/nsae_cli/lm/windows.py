"""A corpus's contexts, numbered, cut into windows of a bounded number of rows.

A window holds as many whole batches of contexts as fit into the buffer. Batches lie as they do in `nsae collect`: from
the corpus's beginning, so that a context is computed beside the same others wherever a window ends, and its residuals
have the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nsae_cli.lm.packing import Context


@dataclass(frozen=True)
class PlannedWindow:
    """The contexts of one window.

    Attributes:
        number: of the window in its epoch, from 0.
        first_context: number of its first context in the corpus, from 0.
        batches: its contexts, a list per forward pass.
    """

    number: int
    first_context: int
    batches: list[list[Context]]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(map(_rows, self.batches))


class ContextWindows:
    """Windows by number. Going forward reads on; going back reads the corpus again from its beginning.

    Args:
        contexts: starts reading the contexts from the first one.
        batch_size: contexts per batch.
        buffer_rows: most rows of a window; at least one batch is taken.
    """

    def __init__(self, contexts: Callable[[], Iterator[Context]], batch_size: int, buffer_rows: int) -> None:
        self._contexts, self._batch_size, self._buffer_rows = contexts, batch_size, buffer_rows
        self._restart()

    def _restart(self) -> None:
        self._stream = self._contexts()
        self._waiting: list[Context] = []
        self._next_window = self._next_context = 0

    def window(self, number: int) -> PlannedWindow | None:
        """The window `number`; None behind the corpus's end. No model is run for those that are passed over."""
        if number < self._next_window:
            self._restart()
        while True:
            planned = self._read()
            if planned is None or planned.number == number:
                return planned

    def _read(self) -> PlannedWindow | None:
        batches: list[list[Context]] = []
        rows = 0
        while batch := self._waiting or list(itertools.islice(self._stream, self._batch_size)):
            self._waiting = batch
            if batches and rows + _rows(batch) > self._buffer_rows:
                break
            batches.append(batch)
            rows += _rows(batch)
            self._waiting = []
        if not batches:
            return None
        planned = PlannedWindow(self._next_window, self._next_context, batches)
        self._next_window += 1
        self._next_context += sum(map(len, batches))
        return planned


def _rows(batch: list[Context]) -> int:
    return sum(map(len, batch))
