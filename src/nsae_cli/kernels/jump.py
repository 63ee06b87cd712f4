"""Learning the thresholds of jumprelu, f = z·H(z − θ) with H the step function (Rajamanoharan et al., 2407.14435).

The loss is a step function of θ_j, with derivative 0 almost everywhere. Its expectation over z is not: moving θ_j
across an entry (row i, feature j) whose z lies there switches it off, f from θ_j to 0. With K(u) = 1 for |u| < 1/2 and
0 elsewhere, z − θ_j within a band of width ε stands for "lies there", with density 1/ε (section 3):

    ∂f_ij/∂θ_j = −(θ_j/ε)·K((z_ij − θ_j)/ε)        ∂H(z_ij − θ_j)/∂θ_j = −(1/ε)·K((z_ij − θ_j)/ε)

θ_j = exp(log_threshold_j) stays positive. Hence, with g_ij = ∂L/∂f_ij, v_i the sparsity weight and J the penalty's jump
(1 for a count, 0 for a penalty that grows from 0),

    ∂L/∂log θ_j = −(θ_j/ε)·Σ_i K((z_ij − θ_j)/ε)·(θ_j·g_ij + J·v_i)

∂f/∂z = H(z − θ), as if θ were a constant.
"""

from __future__ import annotations

import torch


def in_band_(gap: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """K(gap/ε) in place of gap = z − θ: 1 or 0."""
    return gap.abs_().lt_(bandwidth / 2)


def threshold_gradient(
    threshold: torch.Tensor, pulled: torch.Tensor, counted: torch.Tensor, bandwidth: float, jump: float
) -> torch.Tensor:
    """∂L/∂log θ [F].

    Args:
        threshold: θ [F].
        pulled: Σ_i K·g_ij [F].
        counted: Σ_i K·v_i [F].
        bandwidth: ε; 0 stands for thresholds that do not learn.
        jump: J.
    """
    if bandwidth == 0:
        return torch.zeros_like(threshold)
    return -(threshold / bandwidth) * (threshold * pulled + jump * counted)


def threshold_gradient_of_entries(
    log_threshold: torch.Tensor,
    cols: torch.Tensor,
    pulled: torch.Tensor,
    counted: torch.Tensor,
    bandwidth: float,
    jump: float,
) -> torch.Tensor:
    """The same from the entries in the band; added up in float64.

    Args:
        log_threshold: log θ [F].
        cols: features of the entries [E].
        pulled: K·g of each [E].
        counted: K·v of each [E].
        bandwidth, jump: see `threshold_gradient`.
    """
    sums = log_threshold.new_zeros((2, len(log_threshold)), dtype=torch.float64)
    sums[0].index_add_(0, cols, pulled.double())
    sums[1].index_add_(0, cols, counted.double())
    gradient = threshold_gradient(log_threshold.double().exp(), sums[0], sums[1], bandwidth, jump)
    return gradient.to(log_threshold.dtype)
