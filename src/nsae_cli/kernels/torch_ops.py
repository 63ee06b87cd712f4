"""The sparse step's operations on torch's own sparse products: any floating dtype, no compiled code of nsae's.

On x86 these products are MKL's. They take over where the compiled loops are not there, and are their twin in tests.
"""

from __future__ import annotations

import warnings

import torch

from nsae_cli.kernels import scratch
from nsae_cli.kernels.entries import Columns, Entries
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.workers import ranges

_BLOCK_BYTES = 48 * 2**20
_MIN_BLOCK_ROWS = 512


class TorchOps:
    """See `entries.SparseOps`."""

    name = "torch CSR, fp32 encoder"

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
        """See `SparseOps.active`."""
        B, F = x.shape[0], b_enc.shape[0]
        block_rows = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (F * x.element_size()))
        counts, cols, pre_acts = [], [], []
        for first, last in ranges(B, block_rows):
            z = scratch.buffer("z", last - first, F, x.dtype, x.device)
            torch.addmm(b_enc, x[first:last], weights.W_enc, out=z)
            if noise is not None:
                z.add_(noise[first:last])
            wanted = z.gt(threshold).logical_or_(z.isnan())  # a NaN is an entry, so that it is found and not lost
            if top_k is not None and top_k < F:
                # A stable sort breaks ties towards the lower column.
                best = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :top_k]
                wanted &= torch.zeros_like(wanted).scatter_(1, best, True)
            counts.append(wanted.sum(dim=1))
            flat = wanted.flatten().nonzero()[:, 0]
            cols.append((flat % F).int())
            pre_acts.append(z.flatten()[flat])
        row_ptr = torch.zeros(B + 1, dtype=torch.int64, device=x.device)
        if not counts:
            return Entries(row_ptr, row_ptr.new_empty(0, dtype=torch.int32), x.new_empty(0))
        torch.cumsum(torch.cat(counts), 0, out=row_ptr[1:])
        return Entries(row_ptr, torch.cat(cols), torch.cat(pre_acts))

    def decode(
        self, entries: Entries, acts: torch.Tensor, weights: Weights, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `SparseOps.decode`."""
        shape = (len(x), weights.W_dec.shape[0])
        error = weights.b_dec - x
        error += _csr(entries.row_ptr, entries.cols, acts, shape) @ weights.W_dec
        pattern = _csr(entries.row_ptr, entries.cols, torch.zeros_like(acts), shape)
        dots = torch.sparse.sampled_addmm(pattern, error, weights.W_dec.t(), beta=0.0).values()
        return error, torch.linalg.vecdot(error, error), dots

    def row_sums(self, entries: Entries, values: torch.Tensor) -> torch.Tensor:
        """See `SparseOps.row_sums`; added up in float64."""
        sums = torch.zeros(len(entries.row_ptr) - 1, dtype=torch.float64, device=values.device)
        return sums.index_add_(0, entries.rows(), values.double()).to(values.dtype)

    def by_feature(
        self, entries: Entries, d_sae: int, delta: torch.Tensor, pull: torch.Tensor, dots: torch.Tensor
    ) -> Columns:
        """See `SparseOps.by_feature`; a stable sort."""
        order = torch.argsort(entries.cols, stable=True)
        cols = entries.cols.long()
        col_ptr = torch.zeros(d_sae + 1, dtype=torch.int64, device=cols.device)
        torch.cumsum(torch.bincount(cols, minlength=d_sae), 0, out=col_ptr[1:])
        sums = torch.zeros(2, d_sae, dtype=torch.float64, device=cols.device)
        sums[0].index_add_(0, cols, delta.double())
        sums[1].index_add_(0, cols, pull.double() * dots.double())
        return Columns(
            col_ptr, entries.rows()[order].int(), delta[order], pull[order], sum_delta=sums[0], sum_along=sums[1]
        )

    def gradients(
        self,
        columns: Columns,
        x: torch.Tensor,
        error: torch.Tensor,
        along: torch.Tensor,
        weights: Weights,
        gradients: Weights,
    ) -> None:
        """See `SparseOps.gradients`."""
        shape = (len(along), len(x))
        gradients.W_enc.copy_((_csr(columns.col_ptr, columns.rows, columns.delta, shape) @ x).t())
        torch.mul(weights.W_dec, along[:, None], out=gradients.W_dec)
        gradients.W_dec += _csr(columns.col_ptr, columns.rows, columns.pull, shape) @ error


def _csr(pointers: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    # MKL takes 32-bit indices without a copy.
    return torch.sparse_csr_tensor(pointers.int(), indices, values, shape, check_invariants=False)


# torch says once per process that CSR tensors are "in beta state". It has said so then, and to nobody: filtering at
# each use would not be safe where cells step side by side in threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _csr(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1))
