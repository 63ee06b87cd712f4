"""Whether one step of nsae and one of SAELens, from the same weights on the same rows, are the same step.

Both sides compute in float32, so they can differ by rounding only; how much that may be is computed here in float64.

Gradients. Every rounding is taken as an independent error of relative size u = 2⁻²⁴ at most, and its variance is
carried through the step to first order: a sum of n products t_k with value s gets the variance its terms bring along,
plus u²·(n·Σt_k² + n·s²) for its own n additions (partial sums are no longer than that, for terms of random sign as
for terms of one sign). So each entry of each gradient has a standard deviation σ, and two sides may differ by
t = 8·√2·σ (8 σ of a Gaussian is exceeded once in 10¹⁵). Rows with a pre-activation within 8·σ of zero are left out:
rounding could switch the feature, and a step is not continuous there. The clipping factor adds c·|g|, c being 64·u for
the norm's own summation and 8 times what the σ make of it. Gradients are read from Adam's first moment.

Weights. Adam's first step moves a weight by lr·g/(|g| + ε), whose slope is ε/(|g| + ε)²; with |Δg| ≤ t the two moves
differ by at most lr·min(2, t·ε/(max(|g| − t, 0) + ε)²). Roundings of Adam's arithmetic add 16·u·lr. Storing a weight
adds 2·u·|w|, one unit in its last place: somewhere among millions of weights the two sides round to neighbours, so
that the largest share of the allowed difference is always near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nsae_cli.kernels.types import Weights

U = 2.0**-24
SIGMAS = 8.0
EPS = 1e-8


@dataclass(frozen=True)
class Exact:
    """Clipped gradients in float64, and the largest difference allowed between two sides' gradients, both by name."""

    gradients: dict[str, torch.Tensor]
    tolerance: dict[str, torch.Tensor]


def sum_variance(count: int, squares: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Variance of the additions in sums of `count` products with these sums of squares and these values."""
    return U**2 * count * (squares + value.square())


def pre_activations(x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x @ W_enc + b_enc and its variance, float64."""
    pre_acts = x @ W_enc + b_enc
    squares = x.square() @ W_enc.square() + b_enc.square()
    return pre_acts, sum_variance(x.shape[1] + 1, squares, pre_acts)


def safe_rows(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Rows none of whose pre-activations rounding can switch on or off, bool [B]."""
    W_enc, b_enc = weights.W_enc.double(), weights.b_enc.double()
    safe = []
    for part in x.double().split(256):
        pre_acts, variance = pre_activations(part, W_enc, b_enc)
        safe.append((pre_acts.abs() > SIGMAS * variance.sqrt()).all(dim=1))
    return torch.cat(safe)


def exact_step(weights: Weights, x: torch.Tensor, beta: float, clip: float) -> Exact:
    """The step's gradients in closed form, float64: mean over rows of ‖x̂ − x‖² + β·Σ f_i·‖d_i‖, relu, free decoder."""
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in weights.tensors())
    x, count = x.double(), len(x)
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    direction = W_dec / norms[:, None]
    pre_acts, var_acts = pre_activations(x, W_enc, b_enc)
    on = (pre_acts > 0).double()
    acts, var_acts = pre_acts * on, var_acts * on
    x_hat = acts @ W_dec + b_dec
    error = (x_hat - x) * (2 / count)
    pull = norms * (beta / count)
    delta = (error @ W_dec.t() + pull) * on
    sums = acts.sum(0) * (beta / count)
    gradients = {
        "W_enc": x.t() @ delta,
        "b_enc": delta.sum(0),
        "W_dec": acts.t() @ error + sums[:, None] * direction,
        "b_dec": error.sum(0),
    }
    # The same once more in squares: first what the factors bring along, then the sum's own additions.
    W_dec2, acts2, active = W_dec.square(), acts.square(), int(on.sum(dim=1).max())
    var_x_hat = var_acts @ W_dec2 + sum_variance(active + 1, acts2 @ W_dec2 + b_dec.square(), x_hat)
    var_error = (var_x_hat + U**2 * (x_hat - x).square()) * (2 / count) ** 2 + U**2 * error.square()
    squares = error.square() @ W_dec2.t() + pull.square()
    var_delta = (var_error @ W_dec2.t() + sum_variance(x.shape[1] + 1, squares, delta)) * on
    var_sums = var_acts.sum(0) * (beta / count) ** 2 + sum_variance(count, acts2.sum(0) * (beta / count) ** 2, sums)
    parallel = var_sums[:, None] * direction.square() + (8 * U) ** 2 * (sums[:, None] * direction).square()
    variances = {
        "W_enc": x.square().t() @ var_delta + sum_variance(count, x.square().t() @ delta.square(), gradients["W_enc"]),
        "b_enc": var_delta.sum(0) + sum_variance(count, delta.square().sum(0), gradients["b_enc"]),
        "W_dec": var_acts.t() @ error.square()
        + acts2.t() @ var_error
        + sum_variance(count, acts2.t() @ error.square(), gradients["W_dec"])
        + parallel,
        "b_dec": var_error.sum(0) + sum_variance(count, error.square().sum(0), gradients["b_dec"]),
    }
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    factor_error = 64 * U + SIGMAS * math.sqrt(sum(float(v.sum()) for v in variances.values())) / norm
    factor = min(1.0, clip / norm)
    tolerance = {
        name: factor * (SIGMAS * math.sqrt(2) * variances[name].sqrt() + factor_error * g.abs())
        for name, g in gradients.items()
    }
    return Exact({name: factor * g for name, g in gradients.items()}, tolerance)


@dataclass(frozen=True)
class Taken:
    """What a side made of the step: its weights after it, and the clipped gradients it used."""

    weights: Weights
    gradients: dict[str, torch.Tensor]


def check(start: Weights, ours: Taken, theirs: Taken, exact: Exact, lr: float) -> str:
    """Compares two sides' gradients and weights, entry by entry; a few lines about it.

    Raises:
        SystemExit: something differs by more than rounding explains.
    """
    worst = {"gradient": 0.0, "weight": 0.0}
    largest, relative, size = 0.0, 0.0, 0.0
    for name, mine in ours.weights.named().items():
        g, t = exact.gradients[name].abs(), exact.tolerance[name]
        gap = (ours.gradients[name].double() - theirs.gradients[name].double()).abs()
        moved = (t * EPS / ((g - t).clamp_min(0) + EPS).square()).clamp_max(2.0) * lr
        allowed = moved + 16 * U * lr + 2 * U * start.named()[name].abs().double()
        difference = (mine.double() - theirs.weights.named()[name].double()).abs()
        # Where t is 0 no row reaches the entry, and both gradients have to be exactly 0.
        worst["gradient"] = max(worst["gradient"], float((gap / t.clamp_min(1e-300)).max()))
        worst["weight"] = max(worst["weight"], float((difference / allowed).max()))
        largest = max(largest, float(difference.max()))
        relative, size = relative + float(gap.square().sum()), size + float(g.square().sum())
    tightness = math.sqrt(sum(float(t.square().sum()) for t in exact.tolerance.values()) / size)
    line = (
        f"gradients differ by {math.sqrt(relative / size):.1e} of their norm (allowed {tightness:.1e}), an entry by at "
        f"most {worst['gradient']:.2f} of what rounding allows; weights after the step by at most "
        f"{largest / lr:.1e} lr, {worst['weight']:.2f} of what it allows"
    )
    if not (worst["gradient"] <= 1 and worst["weight"] <= 1):
        raise SystemExit(f"nsae and sae-lens do not take the same step: {line}")
    return line
