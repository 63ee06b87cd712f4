"""How far x̂ is from x: the measures of a row's error that a loss may have, value and gradient side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from nsae_cli.kernels.types import Distance, Measured


@dataclass(frozen=True)
class SquaredError:
    """D = ‖x̂ − x‖², of degree 2; ∂D/∂x̂ = 2(x̂ − x)."""

    name: ClassVar[str] = "squared error"
    degree: ClassVar[int] = 2

    def value(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        return (x_hat - x).square().sum(dim=1)

    def measure_(self, x: torch.Tensor, x_hat: torch.Tensor) -> Measured:
        error = x_hat.sub_(x)
        return Measured(torch.linalg.vecdot(error, error), error, 2.0)


@dataclass(frozen=True)
class CosineDistance:
    """D = ‖x̂/‖x̂‖ − x/‖x‖‖² = 2(1 − c), c = cos(x, x̂), of degree 0; ∂D/∂x̂ = 2(c·x̂/‖x̂‖ − x/‖x‖)/‖x̂‖.

    c := 0 where x̂ = 0 or x = 0, so D = 2 there, and the gradient is 0. It grows like 1/‖x̂‖ where x̂ is short, and is
    always perpendicular to x̂, since D does not depend on how long x̂ is.
    """

    name: ClassVar[str] = "cosine distance"
    degree: ClassVar[int] = 0

    def value(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm
        defined = (norm(x, dim=1) > 0) & (norm(x_hat.detach(), dim=1) > 0)
        # Other numbers in the rows where there is no angle: a gradient of 0/0 would be NaN even if nobody takes it.
        x, x_hat = (torch.where(defined[:, None], rows, 1.0) for rows in (x, x_hat))
        cosine = (x * x_hat).sum(dim=1) / (norm(x, dim=1) * norm(x_hat, dim=1))
        return 2 - 2 * torch.where(defined, cosine, 0.0)

    def measure_(self, x: torch.Tensor, x_hat: torch.Tensor) -> Measured:
        norm, norm_hat = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in (x, x_hat))
        defined = (norm > 0) & (norm_hat > 0)
        direction = torch.where(defined, x_hat / norm_hat, 0.0)
        # Of the difference of unit vectors: 1 − c would lose the digits of a small angle.
        gap = direction - torch.where(defined, x / norm, 0.0)
        value = torch.linalg.vecdot(gap, gap)
        # c·x̂/‖x̂‖ − x/‖x‖ = gap − (1 − c)·x̂/‖x̂‖, and 1 − c = D/2.
        slope = gap.addcmul_(direction, value[:, None], value=-0.5)
        x_hat.sub_(x)
        defined, norm_hat = defined[:, 0], norm_hat[:, 0]
        return Measured(torch.where(defined, value, 2.0), slope, torch.where(defined, 2 / norm_hat, 0.0))


SQUARED_ERROR: Distance = SquaredError()
COSINE_DISTANCE: Distance = CosineDistance()
