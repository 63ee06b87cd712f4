"""Where training starts: a reconstruction of the right length from the first step on.

With W_enc = W_decᵀ alone, x̂ starts 4–16 times too long and early training only shrinks it (and may switch high-norm
tokens off for good); one factor set on one batch avoids that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.nonlinearity import NONLINEARITIES

_WEISZFELD_STEPS = 100
_BISECTIONS = 60


def geometric_median(rows: torch.Tensor) -> torch.Tensor:
    """The point with the least summed distance to `rows` [N, d], by Weiszfeld's iteration in float64. → [d] float64"""
    rows = rows.double()
    median = rows.mean(dim=0)
    for _ in range(_WEISZFELD_STEPS):
        distances = torch.linalg.vector_norm(rows - median, dim=1)
        weights = 1 / distances.clamp_min(1e-12 * float(distances.max().clamp_min(1e-300)))
        following = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        moved = float(torch.linalg.vector_norm(following - median))
        median = following
        if moved <= 1e-7 * float(torch.linalg.vector_norm(median).clamp_min(1e-30)):
            break
    return median


def initialise(
    act: str, decoder: str, d_sae: int, batch: torch.Tensor, non_sinks: torch.Tensor, generator: torch.Generator
) -> Weights:
    """Initial weights in the units of `batch`, float32 on its device.

    Rows of W_dec are random unit vectors and W_enc = W_decᵀ; b_dec is the geometric median of the non-sink rows and
    b_enc = −b_dec @ W_enc, so that pre_acts = (x − b_dec) @ W_enc. One factor, on W_enc (decoder unit, bounded) or on
    W_dec (free), is set so that Σ‖x̂ − b_dec‖ = Σ‖x − b_dec‖ over the batch.

    Args:
        act: name of the activation.
        decoder: ``unit``, ``free`` or ``bounded``.
        d_sae: number of features F.
        batch: scaled rows x' [N, d].
        non_sinks: which of them are no sinks [N], bool.
        generator: CPU generator of the random rows.
    """
    d_in = batch.shape[1]
    rows = batch[non_sinks] if bool(non_sinks.any()) else batch
    W_dec = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64).to(batch.device)
    W_dec /= torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_enc = W_dec.t().clone()
    b_dec = geometric_median(rows)
    centred = batch.double() - b_dec
    projected = centred @ W_enc
    target = torch.linalg.vector_norm(centred, dim=1).sum()
    nonlinearity = NONLINEARITIES[act]

    def length(encoder_factor: float) -> torch.Tensor:
        acts = nonlinearity.value(projected * encoder_factor)
        return torch.linalg.vector_norm(acts @ W_dec, dim=1).sum()

    if float(target) > 0:
        if decoder == "free":
            W_dec = W_dec * (target / length(1.0)).item()
        elif nonlinearity.homogeneous:
            W_enc = W_enc * (target / length(1.0)).item()
        else:
            W_enc = W_enc * _solve_increasing(length, float(target))
    b_enc = -(b_dec @ W_enc)
    return Weights(*(tensor.float().contiguous() for tensor in (W_enc, b_enc, W_dec, b_dec)))


def _solve_increasing(length: Callable[[float], torch.Tensor], target: float) -> float:
    """The factor at which an increasing, bounded function reaches the target (or all but 1 % of its bound)."""
    low, high = 1e-6, 1e6
    target = min(target, 0.99 * float(length(high)))
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if float(length(middle)) < target:
            low = middle
        else:
            high = middle
    return (low * high) ** 0.5
