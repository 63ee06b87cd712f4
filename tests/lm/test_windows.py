"""Contexts cut into windows: whole batches, a bounded number of rows, any window again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nsae_cli.lm.packing import Context
from nsae_cli.lm.windows import ContextWindows

LENGTHS = [5, 3, 8, 8, 1, 2, 8, 8, 4, 6, 7]


def contexts() -> Iterator[Context]:
    for number, length in enumerate(LENGTHS):
        yield Context(np.full(length, number, np.int32), np.zeros(length, np.int32))


def numbers(windows: ContextWindows, window: int) -> list[list[int]] | None:
    planned = windows.window(window)
    return None if planned is None else [[int(c.tokens[0]) for c in batch] for batch in planned.batches]


def test_whole_batches_from_the_beginning_up_to_the_buffer() -> None:
    """Batches of 2 hold 8, 16, 3, 16, 10 and 7 rows."""
    windows = ContextWindows(contexts, batch_size=2, buffer_rows=20)
    assert numbers(windows, 0) == [[0, 1]]
    assert numbers(windows, 1) == [[2, 3], [4, 5]]
    assert numbers(windows, 2) == [[6, 7]]
    assert numbers(windows, 3) == [[8, 9], [10]]
    assert numbers(windows, 4) is None
    assert numbers(windows, 4) is None


def test_first_context_and_rows() -> None:
    planned = ContextWindows(contexts, 2, 20).window(3)
    assert planned is not None
    assert (planned.number, planned.first_context, planned.rows) == (3, 8, 17)


@pytest.mark.parametrize("order", [(3, 1), (0, 0), (2, 2, 0), (4, 0, 3)])
def test_windows_in_any_order_are_the_same(order: tuple[int, ...]) -> None:
    fresh = {number: numbers(ContextWindows(contexts, 2, 20), number) for number in range(5)}
    windows = ContextWindows(contexts, 2, 20)
    assert [numbers(windows, number) for number in order] == [fresh[number] for number in order]


def test_a_batch_that_fills_the_buffer_exactly_fits() -> None:
    windows = ContextWindows(contexts, 2, 24)
    assert numbers(windows, 0) == [[0, 1], [2, 3]]


def test_no_contexts_no_window() -> None:
    assert ContextWindows(lambda: iter(()), 2, 20).window(0) is None
