"""Exact quantiles of a stream of norms in memory that does not grow with the stream.

For non-negative float32 values the bit pattern, read as an integer, rises with the value. So order statistics are
found by radix selection: a first pass counts the upper 16 bits of each value, which tells the bucket of every rank
that is wanted; a second pass counts the lower 16 bits within those buckets only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nsae_cli import catalogue

_HALF_BITS = 16
_HIGH_BUCKETS = 1 << (_HALF_BITS - 1)  # the sign bit is 0
_LOW_BUCKETS = 1 << _HALF_BITS


def stream_quantiles(chunks: Callable[[], Iterable[Tensor]], levels: Sequence[float]) -> tuple[int, list[float] | None]:
    """Quantiles of all values of a stream, interpolated linearly in float64 as numpy.quantile does by default.

    With the values sorted as v_0 … v_{N−1}, level q lies at h = q·(N−1):
    v_⌊h⌋ + (h − ⌊h⌋)·(v_{⌊h⌋+1} − v_⌊h⌋).

    Memory: one histogram of 2¹⁵ buckets and, for each distinct bucket that a level falls into (at most two per
    level), one of 2¹⁶.

    Args:
        chunks: opens the stream; called twice, and must yield the same values both times. Values are non-negative,
            of any shape, and are read as float32.
        levels: in [0, 1], in any order.

    Returns:
        The number of values, and one quantile per level; None in place of the quantiles if there are no values.

    Raises:
        NumericalError: a value is negative or not finite.
    """
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels must lie in [0, 1], got {list(levels)}")
    high_counts = torch.zeros(_HIGH_BUCKETS, dtype=torch.int64)
    for chunk in chunks():
        high_counts += torch.bincount(_bits(chunk) >> _HALF_BITS, minlength=_HIGH_BUCKETS)
    count = int(high_counts.sum())
    if count == 0:
        return 0, None

    positions = [level * (count - 1) for level in levels]
    ranks = torch.tensor(sorted({rank for h in positions for rank in (math.floor(h), math.ceil(h))}))
    order_statistic = _select(chunks, high_counts, ranks)
    return count, [
        _interpolate(order_statistic[math.floor(h)], order_statistic[math.ceil(h)], h - math.floor(h))
        for h in positions
    ]


def _bits(chunk: Tensor) -> Tensor:
    """Bit patterns of the values, int64 [number of values], on the host."""
    values = chunk.detach().reshape(-1).to("cpu", torch.float32)
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise catalogue.STORE_NOT_FINITE(
            "a norm is negative or not finite, so the quantiles of the norms are undefined; "
            "collect the activations again"
        )
    # Adding zero turns −0.0, whose pattern is the smallest integer, into 0.0.
    return (values + 0.0).view(torch.int32).long()


def _select(chunks: Callable[[], Iterable[Tensor]], high_counts: Tensor, ranks: Tensor) -> dict[int, float]:
    """The values at the given ranks (0 is the smallest)."""
    cumulative = high_counts.cumsum(0)
    buckets = torch.searchsorted(cumulative, ranks, right=True)
    wanted, slot_of_rank = buckets.unique(return_inverse=True)
    slot_of_bucket = torch.full((_HIGH_BUCKETS,), -1)
    slot_of_bucket[wanted] = torch.arange(len(wanted))

    low_counts = torch.zeros(len(wanted), _LOW_BUCKETS, dtype=torch.int64)
    for chunk in chunks():
        bits = _bits(chunk)
        slot = slot_of_bucket[bits >> _HALF_BITS]
        inside = slot >= 0
        cell = slot[inside] * _LOW_BUCKETS + (bits[inside] & (_LOW_BUCKETS - 1))
        low_counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
    if not torch.equal(low_counts.sum(1), high_counts[wanted]):
        raise RuntimeError("the stream yielded other values the second time it was read")

    rank_in_bucket = ranks - (cumulative - high_counts)[buckets]
    low = torch.searchsorted(low_counts.cumsum(1)[slot_of_rank], rank_in_bucket[:, None], right=True)[:, 0]
    values = ((buckets << _HALF_BITS) | low).to(torch.int32).view(torch.float32).double()
    return dict(zip(ranks.tolist(), values.tolist(), strict=True))


def _interpolate(below: float, above: float, fraction: float) -> float:
    # From the nearer end, as numpy does: monotonic in `fraction` and exact at both ends.
    if fraction >= 0.5:
        return above - (above - below) * (1 - fraction)
    return below + (above - below) * fraction
