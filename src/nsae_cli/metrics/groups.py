"""Groups of rows (ten norm bins and the sinks), the sums over each, and the scopes built from them.

Each row is in exactly one group, so one set of sums per group serves every scope: `ns` is the sum of the bins and
`all` is `ns` plus the sinks, from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypedDict, TypeVar

import torch
from torch import Tensor

N_BINS = 10
SINKS = 10
N_GROUPS = 11
ZERO_ROW_FRACTION = 1e-6

ALL = slice(0, N_GROUPS)
NON_SINKS = slice(0, N_BINS)

T = TypeVar("T")


class Scoped(TypedDict, Generic[T]):
    """One value for each scope; `bins` holds ten."""

    all: T
    ns: T
    sinks: T
    bins: list[T]


def norm_groups(norm: Tensor, edges: Tensor | Sequence[float], is_sink: Tensor) -> Tensor:
    """Group of each row: its norm bin 0…9, or 10 for a sink.

    Bin b holds edges[b−1] ≤ n < edges[b]; bin 0 is open below and bin 9 above.

    Args:
        norm: n, float32 [B].
        edges: the nine inner deciles of n over ns training rows, rising.
        is_sink: bool [B].

    Returns:
        int64 [B].
    """
    # In float64 on both sides: rounding an edge to float32 could move a row across it.
    boundaries = torch.as_tensor(edges, dtype=torch.float64, device=norm.device)
    if boundaries.shape != (N_BINS - 1,):
        raise ValueError(f"edges must be {N_BINS - 1} numbers, got shape {tuple(boundaries.shape)}")
    return torch.bucketize(norm.double(), boundaries, right=True).masked_fill(is_sink, SINKS)


def zero_rows(norm: Tensor, norm_scale: float) -> Tensor:
    """Rows whose norm is nothing beside the hook's: n < 1e-6·ñ, bool [B]."""
    return norm < ZERO_ROW_FRACTION * norm_scale


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """Sums over the rows of each group, float64 on the host: values [B, K], group [B] → [N_GROUPS, K].

    On the host, since there the order of addition is fixed, and as a scatter, so that a non-finite row spoils its own
    group only.
    """
    sums = torch.zeros(N_GROUPS, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, group.cpu(), values.double().cpu())


def per_scope(value: Callable[[slice], T]) -> Scoped[T]:
    """Evaluates `value` for each scope, given as the slice of the groups that it holds."""
    return {
        "all": value(ALL),
        "ns": value(NON_SINKS),
        "sinks": value(slice(SINKS, SINKS + 1)),
        "bins": [value(slice(b, b + 1)) for b in range(N_BINS)],
    }
