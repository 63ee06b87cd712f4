"""The active (row, feature) pairs of a batch, by row and by feature, and the operations of the sparse step.

B rows, d = d_in, F = d_sae, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.types import Weights


class TooManyEntriesError(Exception):
    """A batch has more active entries than the operations have room for: it takes a dense step.

    Args:
        found: how many there are (or may be).
        most: for how many there is room.
    """

    def __init__(self, found: int, most: int) -> None:
        super().__init__(f"{found} active entries, room for {most}")


@dataclass
class Entries:
    """Active entries in the order of rows, and of columns within a row.

    Attributes:
        row_ptr: where each row's entries begin, int64 [B + 1]
        cols: their features, int32 [E]
        pre_acts: their pre-activations [E]
    """

    row_ptr: torch.Tensor
    cols: torch.Tensor
    pre_acts: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Entries per row, int64 [B]."""
        return self.row_ptr.diff()

    def rows(self) -> torch.Tensor:
        """The row of each entry, int64 [E]."""
        return torch.repeat_interleave(self.counts, output_size=len(self.cols))

    def keep(self, wanted: torch.Tensor) -> Entries:
        """Some of the entries; wanted: bool [E]."""
        kept = torch.zeros_like(self.row_ptr)
        torch.cumsum(torch.bincount(self.rows()[wanted], minlength=len(self.row_ptr) - 1), 0, out=kept[1:])
        return Entries(kept, self.cols[wanted], self.pre_acts[wanted])


@dataclass
class Columns:
    """The same entries in the order of features, and of rows within a feature, with what the gradients need.

    Attributes:
        col_ptr: where each feature's entries begin, int64 [F + 1]
        rows: their rows, int32 [E]
        delta: ∂L/∂pre_act of each entry [E]
        pull: 2·error_weight·act of each entry [E]
        sum_delta: Σ delta per feature, float64 [F]: the gradient of b_enc
        sum_along: Σ pull·(error·W_dec,j) per feature, float64 [F]: ⟨∂L_error/∂W_dec,j, W_dec,j⟩
    """

    col_ptr: torch.Tensor
    rows: torch.Tensor
    delta: torch.Tensor
    pull: torch.Tensor
    sum_delta: torch.Tensor
    sum_along: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """In how many rows each feature is active, int64 [F]."""
        return self.col_ptr.diff()


class SparseOps(Protocol):
    """Twins of these have equal results up to the order of sums; `sparse.SparseStep` is written in terms of them."""

    @property
    def name(self) -> str: ...

    def active(
        self,
        x: torch.Tensor,
        weights: Weights,
        b_enc: torch.Tensor,
        *,
        noise: torch.Tensor | None,
        threshold: float,
        top_k: int | None,
    ) -> Entries:
        """Entries of x @ W_enc + b_enc (+ noise) that exceed the threshold, at most the `top_k` largest of each row.

        Args:
            x: [B, d]
            weights: W_enc is used; b_enc is given apart, since callers shift it.
            noise: [B, F] or None.
            threshold: at least 0.
            top_k: None for all.
        """

    def decode(
        self, entries: Entries, acts: torch.Tensor, weights: Weights, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """error = acts @ W_dec + b_dec − x [B, d], ‖error‖² [B], and error[row]·W_dec[col] of every entry [E]."""

    def row_sums(self, entries: Entries, values: torch.Tensor) -> torch.Tensor:
        """Σ values over each row's entries [B]; values: [E]."""

    def by_feature(
        self, entries: Entries, d_sae: int, delta: torch.Tensor, pull: torch.Tensor, dots: torch.Tensor
    ) -> Columns:
        """Sorts the entries by feature; delta, pull, dots: [E] in the order of rows."""

    def gradients(
        self,
        columns: Columns,
        x: torch.Tensor,
        error: torch.Tensor,
        along: torch.Tensor,
        weights: Weights,
        gradients: Weights,
    ) -> None:
        """W_enc,j: Σ delta·x[row]; W_dec,j: Σ pull·error[row] + along_j·W_dec,j; overwrites both in `gradients`.

        Args:
            along: [F]
        """


@runtime_checkable
class UpdatingOps(SparseOps, Protocol):
    """Operations that take the optimizer's step too."""

    def update(
        self,
        columns: Columns,
        x: torch.Tensor,
        error: torch.Tensor,
        along: torch.Tensor,
        weights: Weights,
        adam: Adam,
        decoder: str,
        lr: float,
    ) -> None:
        """The gradients of `gradients`, Adam's step on W_enc and W_dec, and the decoder's constraint, in one pass.

        Args:
            adam: holds the moments; `adam.step_biases` has counted this step already.
            decoder: ``free``, ``unit`` or ``bounded``.
            lr: learning rate.
        """
