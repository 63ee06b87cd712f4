"""The k largest pre-activations of a row or of a batch, dense. Ties go to the lower row, then to the lower column.

A NaN always stays selected, so that it is found and not lost.
"""

from __future__ import annotations

import torch


def row_top_k(z: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest of each row are (all of a row that is not longer); z: [B, F] → bool [B, F]."""
    if k >= z.shape[1]:
        return torch.ones_like(z, dtype=torch.bool)
    least = torch.topk(z, k, dim=1, sorted=True).values[:, -1:]
    chosen = ~(z < least)
    surplus = chosen.sum(dim=1, keepdim=True) > k
    if bool(surplus.any()):
        ties = z == least
        room = k - (chosen & ~ties).sum(dim=1, keepdim=True)
        chosen &= ~ties | (torch.cumsum(ties, dim=1) <= room)
    return chosen


class BatchTopK:
    """Finds the `count` largest positive entries of a batch that comes in blocks of rows, in two passes.

    Args:
        count: k·B.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._best: torch.Tensor | None = None
        self._ties_left: torch.Tensor | None = None

    def offer(self, z: torch.Tensor) -> None:
        """First pass: looks at a block [rows, F]."""
        values = z.flatten() if self._best is None else torch.cat([self._best, z.flatten()])
        self._best = torch.topk(values, min(self._count, len(values)), sorted=False).values

    def choose(self, z: torch.Tensor) -> torch.Tensor:
        """Second pass: where the largest are in a block, bool [rows, F]; blocks in the order of their rows."""
        assert self._best is not None
        least = self._best.min().clamp_min(0)  # NaN if there are nothing but NaNs: then everything stays
        if self._ties_left is None:
            self._ties_left = self._count - (self._best > least).sum()
        ties = (z == least).flatten()
        first_ties = ties & (torch.cumsum(ties, 0) <= self._ties_left) if bool(ties.sum() > self._ties_left) else ties
        self._ties_left = self._ties_left - first_ties.sum()
        return ~(z < least) & ~(ties & ~first_ties).view_as(z)
