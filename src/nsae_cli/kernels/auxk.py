"""AuxK: dead features learn to model what the others leave of the input (Gao et al., 2406.04093, section A.2).

With r_i = x_i − x̂_i held constant and ê_i = Σ_j h_ij d_j (no b_dec), where h_ij are the k_aux largest relu(z_ij) of
row i among the dead features, the training loss gains

    L_aux = coefficient · Σ_i w_i·‖ê_i − r_i‖²

with the same error weight w_i as the squared error itself: n_i^(−p)/B in nsae. (The paper divides both terms by the
same constant, so their ratio is the same.) Its gradients are those of a top-k SAE of the dead features on r:

    δ_ij = 2·coefficient·w_i·(ê_i − r_i)·d_j where h_ij > 0
    ∂W_enc,j = Σ_i δ_ij x_i      ∂b_enc,j = Σ_i δ_ij      ∂W_dec,j = Σ_i 2·coefficient·w_i·h_ij·(ê_i − r_i)

and nothing for b_dec. Which features are dead is a matter of statistics before this batch, as in the paper: one that
is active in this batch after all is modelled here once more.
"""

from __future__ import annotations

import torch

from nsae_cli.kernels.dense import DenseGradients
from nsae_cli.kernels.selection import row_top_k
from nsae_cli.kernels.types import Exchange, Weights
from nsae_cli.kernels.update import Gradients

#: Of the paper's training runs.
COEFFICIENT = 1 / 32


def default_k_aux(d_in: int) -> int:
    """A power of two near d_in/2 (the paper's rule; nearest in the logarithm): 512 for d_in = 768."""
    half = max(1.0, d_in / 2)
    power = 1
    while power * 2**0.5 <= half:
        power *= 2
    return power


@torch.no_grad()
def with_auxiliary_loss(
    gradients: Gradients,
    x: torch.Tensor,
    weights: Weights,
    dead: torch.Tensor,
    *,
    k_aux: int,
    error_weight: torch.Tensor,
    noise: torch.Tensor | None = None,
    coefficient: float = COEFFICIENT,
    exchange: Exchange | None = None,
) -> Gradients:
    """The step's gradients with those of L_aux added; the same object where no feature is dead.

    Args:
        gradients: of the step; its result's error is x̂ − x.
        x: [B, d]
        weights: at which the step was taken.
        dead: bool [F].
        k_aux: dead features per row.
        error_weight: w [B], the mean over rows already in it.
        noise: of the step [B, F], or None.
        coefficient: of the auxiliary loss.
        exchange: with the processes that have other features; None: all are here.
    """
    columns = dead.nonzero()[:, 0]
    there_are_some = bool(len(columns)) if exchange is None else exchange.any_feature(bool(len(columns)))
    if not there_are_some or not len(x):
        return gradients
    full, residual = gradients.full(), -gradients.result.error
    W_dec = weights.W_dec[columns]
    h = torch.addmm(weights.b_enc[columns], x, weights.W_enc[:, columns])
    if noise is not None:
        h += noise[:, columns]
    largest = row_top_k(h, k_aux) if exchange is None else exchange.row_top_k(h, k_aux)
    h.masked_fill_(~largest, 0).relu_()
    if exchange is None or exchange.whole_rows:
        gap = torch.addmm(residual, h, W_dec, beta=-1)
    else:
        gap = h @ W_dec
        exchange.add_features_(gap)
        gap -= residual
    pulled = gap * (2 * coefficient * error_weight)[:, None]
    delta = (pulled @ W_dec.t()).masked_fill_(h <= 0, 0)
    full.W_enc.index_add_(1, columns, x.t() @ delta)
    full.b_enc.index_add_(0, columns, delta.sum(dim=0))
    full.W_dec.index_add_(0, columns, h.t() @ pulled)
    return DenseGradients(gradients.result, full)
