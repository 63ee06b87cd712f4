"""`--row-weights`: controls that tell what a loss's weights do from what they do by their size or by their owner."""

from __future__ import annotations

from typing import Literal

import torch

from nsae_cli.store.batches import stable_seed

RowWeights = Literal["plain", "mean-one", "permuted"]


def batch_weights(
    kind: RowWeights,
    plain: tuple[torch.Tensor, torch.Tensor],
    zero: torch.Tensor,
    typical: tuple[float, float],
    seed: int,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (w, v) of a batch's rows, on error and penalty.

    ``plain``: w = n^(−p), v = n^(−q), as they come.
    ``mean-one``: w ← w·ñ^(−p) / mean w and v ← v·ñ^(−q) / mean v, means over the batch's live rows: weights of mean 1
    but for a constant, by which α, β and the loss keep the units and the meaning that they have with plain weights.
    ``permuted``: each live row takes the weights of another live row: along a random cycle through all of them, which
    is a function of (seed, step). Their distribution is the same, their relation to the rows is gone.

    Rows that are zero keep weight 0.

    Args:
        plain: w and v [B].
        zero: rows that count for nothing [B].
        typical: ñ^(−p) and ñ^(−q), the weights of a typical row.
        seed: of the SAE.
        step: 0-based.
    """
    if kind == "mean-one":
        rows = (~zero).sum().clamp_min(1)
        w, v = (
            weight * (constant * rows / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny))
            for weight, constant in zip(plain, typical, strict=True)
        )
        return w, v
    if kind == "permuted":
        live = torch.nonzero(~zero).flatten()
        generator = torch.Generator().manual_seed(stable_seed("row-weights", seed, step))
        cycle = live[torch.randperm(len(live), generator=generator).to(live.device)]
        w, v = (weight.index_copy(0, cycle, weight[cycle.roll(-1)]) for weight in plain)
        return w, v
    return plain
