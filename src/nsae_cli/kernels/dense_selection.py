"""Which entries a dense step keeps, block of rows by block of rows, and what its thresholds learn. F = d_sae."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsae_cli.kernels import scratch
from nsae_cli.kernels.jump import in_band_, threshold_gradient
from nsae_cli.kernels.selection import BatchTopK, row_top_k
from nsae_cli.kernels.types import BatchChoice, Exchange, Selection, Weights


class DenseSelection:
    """All entries; what is not positive the activation itself makes 0.

    Attributes:
        two_passes: whether every block has to be offered to `look` before the first one is given to `apply_`.
    """

    two_passes = False

    def look(self, pre_acts: torch.Tensor) -> None:
        """First pass over a block [rows, F]."""

    def apply_(self, pre_acts: torch.Tensor) -> None:
        """Makes the entries 0 that are not kept, in a block [rows, F]; blocks in the order of their rows."""

    def learn(self, act_gradient: torch.Tensor, sparsity_weight: torch.Tensor) -> None:
        """Takes ∂L/∂acts [rows, F] and the sparsity weight [rows] of the block that `apply_` has seen last."""

    def write(self, gradients: Weights, jump: float) -> None:
        """Overwrites the gradient of the thresholds; `jump`: of the penalty."""

    def least_act(self, acts: torch.Tensor) -> torch.Tensor | None:
        """The smallest positive act so far, the block's [rows, F] included; None where nobody asks for it."""
        return None


class _RowTopK(DenseSelection):
    def __init__(self, k: int, choose: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self._k, self._choose = k, choose

    def apply_(self, pre_acts: torch.Tensor) -> None:
        pre_acts.masked_fill_(~self._choose(pre_acts, self._k), 0)


class _BatchTopK(DenseSelection):
    two_passes = True

    def __init__(self, largest: BatchChoice, like: torch.Tensor) -> None:
        self._largest = largest
        self._least = like.new_tensor(torch.inf)

    def look(self, pre_acts: torch.Tensor) -> None:
        self._largest.offer(pre_acts)

    def apply_(self, pre_acts: torch.Tensor) -> None:
        pre_acts.masked_fill_(~self._largest.choose(pre_acts), 0)

    def least_act(self, acts: torch.Tensor) -> torch.Tensor:
        if acts.numel():
            self._least = torch.minimum(self._least, acts.masked_fill(acts <= 0, torch.inf).min())
        return self._least


class _AboveThreshold(DenseSelection):
    def __init__(self, bandwidth: float, log_threshold: torch.Tensor) -> None:
        self._bandwidth = bandwidth
        self._threshold = log_threshold.exp()
        self._pulled, self._counted = torch.zeros_like(self._threshold), torch.zeros_like(self._threshold)
        self._band = self._threshold  # of the present block; a shared buffer

    def apply_(self, pre_acts: torch.Tensor) -> None:
        self._band = scratch.buffer("band", len(pre_acts), pre_acts.shape[1], pre_acts.dtype, pre_acts.device)
        gap = torch.sub(pre_acts, self._threshold, out=self._band)
        pre_acts.masked_fill_(gap <= 0, 0)
        in_band_(gap, self._bandwidth)

    def learn(self, act_gradient: torch.Tensor, sparsity_weight: torch.Tensor) -> None:
        self._counted += sparsity_weight @ self._band
        self._pulled += self._band.mul_(act_gradient).sum(dim=0)

    def write(self, gradients: Weights, jump: float) -> None:
        assert gradients.log_threshold is not None
        gradients.log_threshold.copy_(
            threshold_gradient(self._threshold, self._pulled, self._counted, self._bandwidth, jump)
        )


def make_selection(
    selection: Selection, weights: Weights, rows: int, exchange: Exchange | None = None
) -> DenseSelection:
    """The selection of one step.

    Args:
        selection: which entries may be active.
        weights: thresholds and dtype.
        rows: B.
        exchange: None where all rows and features are here.
    """
    if selection.bandwidth is not None:
        assert weights.log_threshold is not None
        return _AboveThreshold(selection.bandwidth, weights.log_threshold)
    if selection.top_k is None:
        return DenseSelection()
    if selection.over == "row":
        return _RowTopK(selection.top_k, row_top_k if exchange is None else exchange.row_top_k)
    here = BatchTopK(selection.top_k * rows) if exchange is None else exchange.batch_top_k(selection.top_k, rows)
    return _BatchTopK(here, weights.b_enc)
