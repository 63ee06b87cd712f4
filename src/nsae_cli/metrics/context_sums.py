"""How well non-sink rows are reconstructed, as sums per context: for resampling contexts and for pairing SAEs."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = ("rows_ns", "l0_ns", "error_sq_ns", "variance_ns", "rho_ns")
#: N, Σ log n, Σ log ρ, Σ log² n, Σ log n · log ρ: what nbi follows from.
N_MOMENTS = 5


class ContextSums:
    """Σ over each context's ns rows of 1, L0, ‖e‖², ‖x − μ‖², ρ, and the moments of log n and log ρ where ρ > 0.

    Args:
        contexts: how many there are.
        mean_ns: μ [d_in], the mean of x over all evaluated ns rows; zeros where there are none.
    """

    def __init__(self, contexts: int, mean_ns: Tensor) -> None:
        self._mean = mean_ns
        self._sums = torch.zeros(contexts, len(COLUMNS), dtype=torch.float64)
        self._moments = torch.zeros(contexts, N_MOMENTS, dtype=torch.float64)

    def update(self, context: Tensor, x: Tensor, x_hat: Tensor, l0: Tensor, taken: Tensor) -> None:
        """Adds rows.

        Args:
            context: which context a row belongs to, as an index, int64 [B].
            x: [B, d_in].
            x_hat: [B, d_in].
            l0: count of f > 0, [B].
            taken: ns rows that are not zero, bool [B].
        """
        x, x_hat, context, l0 = x[taken].double(), x_hat[taken].double(), context[taken.cpu()].cpu(), l0[taken]
        error, centred = x_hat - x, x - self._mean.to(x)
        x_sq, error_sq = torch.linalg.vecdot(x, x), torch.linalg.vecdot(error, error)
        rho = error_sq / x_sq
        columns = [torch.ones_like(rho), l0.double(), error_sq, torch.linalg.vecdot(centred, centred), rho]
        self._sums.index_add_(0, context, torch.stack(columns, dim=1).cpu())
        positive = (rho > 0).cpu()
        log_norm, log_rho = (x_sq.log() / 2).cpu()[positive], rho.cpu()[positive].log()
        moments = [torch.ones_like(log_norm), log_norm, log_rho, log_norm**2, log_norm * log_rho]
        self._moments.index_add_(0, context[positive], torch.stack(moments, dim=1))

    def tensors(self) -> dict[str, Tensor]:
        """The sums by the names of `COLUMNS`, float64 [contexts], and `nbi_moments` [contexts, 5]."""
        named = dict(zip(COLUMNS, self._sums.unbind(dim=1), strict=True))
        return {**named, "nbi_moments": self._moments}
