"""How the cells of a grid share the processor.

A small matrix product gains nothing from a second thread: waiting at its barriers costs more than half of the product
(at d_in 64, d_sae 512, batch 512 on two busy cores, six cells took 190 ms a step with two threads each and 34 ms with
one thread each, side by side). Large ones use all threads, one cell after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

#: Multiplications of one of a step's products (batch · d_in · d_sae) up to which one thread is faster than several.
SMALL_PRODUCT = 2**27

T = TypeVar("T")
R = TypeVar("R")


class CellPool:
    """Runs a function on every cell.

    Args:
        threads: how many cells at a time; 1 runs them in the calling thread.
    """

    def __init__(self, threads: int) -> None:
        # Each thread has its own floating-point mode, see `loop._numerics`.
        self._executor = ThreadPoolExecutor(threads, initializer=_flush_denormals) if threads > 1 else None

    def map(self, function: Callable[[T], R], cells: Iterable[T]) -> list[R]:
        """Results in the order of `cells`; the first error is raised."""
        if self._executor is None:
            return [function(cell) for cell in cells]
        return list(self._executor.map(function, cells))

    def close(self) -> None:
        """Ends the threads."""
        if self._executor is not None:
            self._executor.shutdown()


def _flush_denormals() -> None:
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def cell_pool(cells: int, largest_product: int, device: torch.device) -> Iterator[CellPool]:
    """The pool for so many cells, with torch's number of threads set to match, and restored afterwards.

    The bits of a result depend on whether the products are small, not on how many cells there are or on how many run
    at a time.
    """
    threads = torch.get_num_threads()
    small = device.type == "cpu" and largest_product <= SMALL_PRODUCT
    pool = CellPool(min(threads, cells) if small else 1)
    if small:
        torch.set_num_threads(1)
    try:
        yield pool
    finally:
        pool.close()
        torch.set_num_threads(threads)
