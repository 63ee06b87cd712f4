"""Whether one step of nsae and one of SAELens, from the same weights on the same rows, end at the same weights.

Both sides compute in float32, so they can differ by rounding only; how much that may be is computed here in float64.

Gradients. The gradient of each parameter is a sum of products. Let G be the same sum with every term, and every term
of the values it is built from, replaced by its absolute value. A chain of n roundings of relative size u = 2⁻²⁴ then
moves the result by at most about λ·√n·u·G with probability 1 − 2exp(−λ²/2) per entry (Higham and Mary, 2019; the
worst case has n in place of λ√n). Here n = d (encoder) + largest L0 (decoder) + d (gradient of acts) + rows (sum over
the batch) + 8 and λ = 8; two sides differ by at most twice that, t. Rows with a pre-activation so close to zero that
rounding can switch the feature (|z| within the same bound) are left out: a step is not continuous there.

Weights. Adam's first step moves a weight by lr·g/(|g| + ε), whose slope is ε/(|g| + ε)²; with |Δg| ≤ t the two moves
differ by at most lr·min(2, t·ε/(max(|g| − t, 0) + ε)²). The clipping factor c scales g and t and adds t_c·|g|, its own
relative error, bounded by that of the norm. Roundings of Adam's arithmetic add 16·u·lr. Storing a weight adds
2·u·|w|, one unit in its last place: somewhere among millions of weights the two sides round to neighbours, so that the
largest share of the allowed difference is always near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nsae_cli.kernels.types import Weights

U = 2.0**-24
LAMBDA = 8.0
EPS = 1e-8


@dataclass(frozen=True)
class Exact:
    """Clipped gradients in float64, the largest difference allowed between two sides' gradients, both by name."""

    gradients: dict[str, torch.Tensor]
    tolerance: dict[str, torch.Tensor]


def safe_rows(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Rows none of whose pre-activations rounding can switch on or off, bool [B]."""
    W_enc, b_enc = weights.W_enc.double(), weights.b_enc.double()
    safe = []
    for part in x.double().split(256):
        # Σ|x_k·w_ki| ≤ ‖x‖·‖w_i‖
        size = torch.linalg.vector_norm(part, dim=1)[:, None] * torch.linalg.vector_norm(W_enc, dim=0) + b_enc.abs()
        safe.append(((part @ W_enc + b_enc).abs() > LAMBDA * math.sqrt(x.shape[1] + 2) * U * size).all(dim=1))
    return torch.cat(safe)


def exact_step(weights: Weights, x: torch.Tensor, beta: float, clip: float) -> Exact:
    """The step's gradients in closed form, float64: mean over rows of ‖x̂ − x‖² + β·Σ f_i·‖d_i‖, relu, free decoder."""
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in weights.tensors())
    x, count = x.double(), len(x)
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    pre_acts = x @ W_enc + b_enc
    on = (pre_acts > 0).double()
    acts = pre_acts * on
    error = (acts @ W_dec + b_dec - x) * (2 / count)
    delta = (error @ W_dec.t() + norms * (beta / count)) * on
    direction = W_dec / norms[:, None]
    gradients = {
        "W_enc": x.t() @ delta,
        "b_enc": delta.sum(0),
        "W_dec": acts.t() @ error + (acts.sum(0) * (beta / count))[:, None] * direction,
        "b_dec": error.sum(0),
    }
    acts_abs = (x.abs() @ W_enc.abs() + b_enc.abs()) * on
    error_abs = (acts_abs @ W_dec.abs() + b_dec.abs() + x.abs()) * (2 / count)
    delta_abs = (error_abs @ W_dec.abs().t() + norms * (beta / count)) * on
    sizes = {
        "W_enc": x.abs().t() @ delta_abs,
        "b_enc": delta_abs.sum(0),
        "W_dec": acts_abs.t() @ error_abs + (acts_abs.sum(0) * (beta / count))[:, None] * direction.abs(),
        "b_dec": error_abs.sum(0),
    }
    roundings = 2 * x.shape[1] + int(on.sum(dim=1).max()) + count + 8
    bound = 2 * LAMBDA * math.sqrt(roundings) * U
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    norm_error = bound * math.sqrt(sum(float(s.square().sum()) for s in sizes.values())) / norm
    factor = min(1.0, clip / norm)
    return Exact(
        {name: g * factor for name, g in gradients.items()},
        {name: (bound * sizes[name] + norm_error * g.abs()) * factor for name, g in gradients.items()},
    )


def check(start: Weights, ours: Weights, theirs: Weights, exact: Exact, lr: float) -> str:
    """Compares the weights after one step, entry by entry; a line about it.

    Raises:
        SystemExit: some weight differs by more than rounding explains.
    """
    worst, largest, sharp, entries = 0.0, 0.0, 0, 0
    for name, mine in ours.named().items():
        g, t = exact.gradients[name].abs(), exact.tolerance[name]
        moved = (t * EPS / ((g - t).clamp_min(0) + EPS).square()).clamp_max(2.0) * lr
        allowed = moved + 16 * U * lr + 2 * U * start.named()[name].abs().double()
        difference = (mine.double() - theirs.named()[name].double()).abs()
        worst = max(worst, float((difference / allowed).max()))
        largest = max(largest, float(difference.max()))
        sharp += int(((allowed < 0.01 * lr) & (g > 0)).sum())
        entries += int((g > 0).sum())
    line = (
        f"one step from the same weights: largest difference of a weight {largest:.2e} = {largest / lr:.1e} lr, "
        f"at most {worst:.3f} of what rounding allows, which is below 0.01 lr for {sharp / entries:.1%} of the weights "
        "that move"
    )
    if not worst <= 1:
        raise SystemExit(f"nsae and sae-lens do not take the same step: {line}")
    return line
