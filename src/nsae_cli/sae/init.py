"""Where training starts: a reconstruction of the right length from the first step on.

With W_enc = W_decᵀ alone, x̂ starts 4–16 times too long and early training only shrinks it (and may switch high-norm
tokens off for good); one factor set on one batch avoids that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from nsae_cli.kernels.dense_selection import make_selection
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.nonlinearity import Nonlinearity

#: θ of jumprelu at step 0, in scaled units.
INITIAL_THRESHOLD = 0.1

_WEISZFELD_STEPS = 100
#: Rows on which the one factor is set: a batch.
_FACTOR_ROWS = 2048
#: Entries of acts that are in memory at a time.
_ACTS_ENTRIES = 2**22
_SOLVER_STEPS = 40
_SOLVER_TOLERANCE = 1e-5


def geometric_median(rows: torch.Tensor) -> torch.Tensor:
    """The point with the least summed distance to `rows` [N, d], by Weiszfeld's iteration. → [d] float64"""
    rows = rows.double()
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    median = rows.mean(dim=0)
    for _ in range(_WEISZFELD_STEPS):
        distances = torch.linalg.vector_norm(rows - median, dim=1)
        farthest = float(distances.max())
        if farthest == 0:
            break
        weights = 1 / distances.clamp_min(1e-9 * farthest)
        following = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        moved = float(torch.linalg.vector_norm(following - median))
        median = following
        if moved <= 1e-7 * float(torch.linalg.vector_norm(median).clamp_min(1e-30)):
            break
    return median


def initialise(
    nonlinearity: Nonlinearity,
    decoder: str,
    d_sae: int,
    batch: torch.Tensor,
    b_dec: torch.Tensor,
    generator: torch.Generator,
) -> Weights:
    """Initial weights in the units of `batch`, float32.

    Rows of W_dec are random unit vectors, W_enc = W_decᵀ and b_enc = −b_dec @ W_enc, so that
    pre_acts = (x − b_dec) @ W_enc. One factor, on W_enc (decoder unit, bounded) or on W_dec (free), is set so that
    Σ‖x̂ − b_dec‖ = Σ‖x − b_dec‖ over the batch. tanh-relu with a bounded decoder cannot be longer than its saturated
    features make it; where that is too short, the factor reaches all but 1 % of it. jumprelu's thresholds start at
    `INITIAL_THRESHOLD`.

    Args:
        nonlinearity: the activation.
        decoder: ``unit``, ``free`` or ``bounded``.
        d_sae: number of features F.
        batch: scaled rows x' [N, d] on the CPU; the first 2048 are used.
        b_dec: where x̂ starts from, in the same units [d]: the geometric median of the non-sink rows.
        generator: CPU generator of the random rows.
    """
    batch = batch[:_FACTOR_ROWS]
    W_dec = torch.randn(d_sae, batch.shape[1], generator=generator, dtype=torch.float64)
    W_dec = (W_dec / torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)).float()
    W_enc = W_dec.t().contiguous()
    b_dec = b_dec.double()
    centred = (batch.double() - b_dec).float()
    target = float(torch.linalg.vector_norm(centred.double(), dim=1).sum())
    learns_thresholds = nonlinearity.selection.bandwidth is not None
    log_threshold = torch.full((d_sae,), math.log(INITIAL_THRESHOLD)) if learns_thresholds else None
    selected = Weights(W_enc, torch.zeros(d_sae), W_dec, b_dec, log_threshold)

    def length(encoder_factor: float) -> float:
        """Σ‖x̂ − b_dec‖ over the batch with the factor on W_enc."""
        parts = centred.split(max(1, _ACTS_ENTRIES // d_sae))
        selection = make_selection(nonlinearity.selection, selected, len(centred))
        if selection.two_passes:
            for part in parts:
                selection.look((part @ W_enc).mul_(encoder_factor))
        total = 0.0
        for part in parts:
            acts = (part @ W_enc).mul_(encoder_factor)
            selection.apply_(acts)
            x_hat = nonlinearity.value_(acts) @ W_dec
            total += float(torch.linalg.vector_norm(x_hat.double(), dim=1).sum())
        return total

    # Where no feature fires on the batch no factor helps, and W_dec's unit rows are as good as any.
    if target > 0 and length(1.0) > 0:
        if decoder == "free":
            W_dec.mul_(target / length(1.0))
        elif nonlinearity.homogeneous and not learns_thresholds:
            W_enc.mul_(target / length(1.0))
        else:
            W_enc.mul_(_solve_increasing(length, target))
    b_enc = -(W_enc.t().double() @ b_dec)
    return Weights(W_enc, b_enc.float(), W_dec, b_dec.float(), log_threshold)


def _solve_increasing(length: Callable[[float], float], target: float) -> float:
    """The factor at which an increasing function reaches the target (or all but 1 % of what it has at 1e6)."""
    low, high = 0.0, 1.0
    bound = length(1e6)
    target = min(target, 0.99 * bound)
    while (at_high := length(high)) < target:
        low, high = high, 2 * high
    at_low = length(low) if low else 0.0
    # Illinois' variant of regula falsi: never leaves the bracket, and needs about eight evaluations.
    side = 0
    below, above = at_low - target, at_high - target
    factor = high
    for _ in range(_SOLVER_STEPS):
        factor = (low * above - high * below) / (above - below)
        difference = length(factor) - target
        if abs(difference) <= _SOLVER_TOLERANCE * target:
            break
        if difference < 0:
            low, below, above = factor, difference, above / 2 if side < 0 else above
            side = -1
        else:
            high, above, below = factor, difference, below / 2 if side > 0 else below
            side = 1
    return factor
