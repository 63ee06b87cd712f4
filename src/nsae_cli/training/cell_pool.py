"""How the cells of a grid share the processor: small ones step side by side, large ones one after another.

At d_in 64, d_sae 512, batch 512 on two busy cores, six cells took 190 ms a step with two threads for each product, and
34 ms side by side with one thread each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class CellPool:
    """Runs a function on every cell; a context manager that ends its threads.

    Args:
        side_by_side: how many cells at a time; 1 runs them in the calling thread.
    """

    def __init__(self, side_by_side: int) -> None:
        self._executor = ThreadPoolExecutor(side_by_side) if side_by_side > 1 else None

    def map(self, function: Callable[[T], R], cells: Iterable[T]) -> list[R]:
        """Results in the order of `cells`; the first error is raised."""
        if self._executor is None:
            return [function(cell) for cell in cells]
        return list(self._executor.map(function, cells))

    def __enter__(self) -> CellPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown()
