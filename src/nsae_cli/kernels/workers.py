"""Threads for the compiled loops: as many as torch uses, over fixed ranges of rows or features."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nsae-kernel")


# A forked child has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def ranges(count: int, size: int) -> list[tuple[int, int]]:
    """0 … count cut into ranges of at most `size`."""
    return [(first, min(count, first + size)) for first in range(0, count, max(1, size))]


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """0 … count cut into at most `parts` ranges of nearly equal size."""
    return ranges(count, -(-count // max(1, parts)))


def in_parallel(function: Callable[[int, int], R], parts: list[tuple[int, int]]) -> list[R]:
    """`function(first, last)` of every range, side by side on torch's number of threads; results in order."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2:
        return [function(first, last) for first, last in parts]
    return list(_pool(threads).map(lambda part: function(*part), parts))
