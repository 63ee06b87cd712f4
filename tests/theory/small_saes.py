"""Random SAEs, inputs and losses in float64, put together from the project's own parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsae_cli.kernels.distance import COSINE_DISTANCE, SQUARED_ERROR
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.types import Activation, Distance, Penalty, StepResult, Weights
from nsae_cli.sae.objective import Objective

D_IN, D_SAE, ROWS = 6, 14, 24

ACTS = ("relu", "tanh-relu")
SPARSITIES = ("l1", "l1-decoder-norm", "tanh")
L2_POWERS = (0, 1, 2)
L1_POWERS = (0, 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(rows: int = ROWS, d_in: int = D_IN, seed: int = 0, spread: float = 0.7) -> Tensor:
    """Rows [rows, d_in] whose norms differ by a log-normal factor."""
    g = generator(seed)
    x = torch.randn(rows, d_in, generator=g, dtype=torch.float64)
    return x * (spread * torch.randn(rows, 1, generator=g, dtype=torch.float64)).exp()


def random_weights(d_in: int = D_IN, d_sae: int = D_SAE, seed: int = 1, bias: float = 0.3) -> Weights:
    """Weights that float32 represents exactly (as saved ones do), held in float64."""
    g = generator(seed)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=g)).double()

    return Weights(random(d_in, d_sae), random(d_sae, size=bias), random(d_sae, d_in), random(d_in, size=bias))


def unit_rows(W_dec: Tensor) -> Tensor:
    return W_dec / W_dec.norm(dim=1, keepdim=True)


def map_weights(weights: Weights, W_enc: float, b_enc: float, W_dec: float, b_dec: float) -> Weights:
    """The weights times one factor each."""
    factors = (W_enc, b_enc, W_dec, b_dec)
    return Weights(*(tensor * factor for tensor, factor in zip(weights.tensors(), factors, strict=True)))


def geometric_mean(norm: Tensor) -> float:
    return math.exp(float(norm.log().mean()))


class Pass:
    """One forward and backward pass of the reference kernel: `result`, `gradients`, and the loss per row."""

    def __init__(
        self,
        x: Tensor,
        weights: Weights,
        activation: Activation,
        penalty: Penalty,
        error_weight: Tensor,
        sparsity_weight: Tensor,
        noise: Tensor | None = None,
        distance: Distance = SQUARED_ERROR,
    ) -> None:
        self.gradients = weights.zeros_like()
        self.result: StepResult = step_gradients(
            x,
            weights,
            self.gradients,
            activation=activation,
            penalty=penalty,
            error_weight=error_weight,
            sparsity_weight=sparsity_weight,
            noise=noise,
            distance=distance,
        )
        self.error_term = error_weight * self.result.distance
        self.sparsity_term = sparsity_weight * self.result.penalty
        self.loss = self.error_term + self.sparsity_term


def run(objective: Objective, x: Tensor, weights: Weights, noise: Tensor | None = None) -> Pass:
    """The objective on raw rows x, as training computes it: in the units x' = s·x, with weights in these units."""
    norm = x.norm(dim=1)
    error_weight, sparsity_weight = objective.row_weights(norm, torch.zeros(len(x), dtype=torch.bool))
    return Pass(
        x * objective.input_scale,
        weights,
        objective.nonlinearity,
        objective.penalty,
        error_weight,
        sparsity_weight * objective.beta_scaled,
        noise,
        objective.distance,
    )


def make(
    act: str = "relu", p: int = 0, q: int = 0, sparsity: str = "l1", beta: float = 0.3, scale: float = 1.0
) -> Objective:
    return Objective(act, p, q, sparsity, beta, scale)


def make_cosine(act: str = "relu", sparsity: str = "l1", beta: float = 0.3, scale: float = 1.0) -> Objective:
    """`--l2-norm cosine`, whose p is 2."""
    few = {"k": 3 if act in ("topk", "batchtopk") else None, "bandwidth": 0.1 if act == "jumprelu" else None}
    return Objective(act, 2, 0, sparsity, beta, scale, **few, distance=COSINE_DISTANCE)  # type: ignore[arg-type]
