"""Random inputs of a training step, and the comparison of a kernel's results with exact ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsae_cli.kernels.types import StepResult, Weights
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.penalty import PENALTIES

Found = tuple[StepResult, Weights]


class Problem:
    """Random inputs of a step.

    Args:
        shape: (B, d, F).
        dtype: of everything.
        bias: of the features; the lower, the fewer are active.
        noisy: with noise on the pre-activations.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, bias: float = -0.2, noisy: bool = False):
        rows, d_in, d_sae = shape
        generator = torch.Generator().manual_seed(rows * 10007 + d_in * 101 + d_sae)

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.x = (randn(rows, d_in) * 1.5).to(dtype)
        self.weights = Weights(
            (randn(d_in, d_sae) / d_in**0.5).to(dtype),
            (randn(d_sae) * 0.3 + bias).to(dtype),
            (randn(d_sae, d_in) / d_sae**0.5).to(dtype),
            (randn(d_in) * 0.2).to(dtype),
        ).by_feature()
        self.error_weight = (torch.rand(rows, generator=generator, dtype=torch.float64) / max(1, rows)).to(dtype)
        self.sparsity_weight = (torch.rand(rows, generator=generator, dtype=torch.float64) * 0.3 / max(1, rows)).to(
            dtype
        )
        self.noise = (randn(rows, d_sae) * 0.2).to(dtype) if noisy else None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        other = object.__new__(Problem)
        other.x, other.weights = self.x.to(dtype), self.weights.to(dtype)
        other.error_weight, other.sparsity_weight = self.error_weight.to(dtype), self.sparsity_weight.to(dtype)
        other.noise = None if self.noise is None else self.noise.to(dtype)
        return other

    def pre_acts(self) -> torch.Tensor:
        """z [B, F], in float64."""
        z = self.x.double() @ self.weights.W_enc.double() + self.weights.b_enc.double()
        return z if self.noise is None else z + self.noise.double()

    def arguments(self, act: str, penalty: str) -> dict:
        """The keyword arguments of a step."""
        return {
            "activation": NONLINEARITIES[act],
            "penalty": PENALTIES[penalty],
            "error_weight": self.error_weight,
            "sparsity_weight": self.sparsity_weight,
            "noise": self.noise,
        }

    def run(self, step: Callable[..., StepResult], act: str, penalty: str) -> Found:
        """Loss terms and gradients; garbage in the gradients must not survive."""
        gradients = Weights(*(torch.full_like(tensor, 7.0) for tensor in self.weights.tensors()))
        return step(self.x, self.weights, gradients, **self.arguments(act, penalty)), gradients


def assert_same(found: Found, expected: Found, relative: float) -> None:
    """Equal up to `relative` of each tensor's largest entry; counts are equal."""
    result, gradients = found
    exact, exact_gradients = expected
    for name in ("error", "sq_error", "penalty", "l1"):
        assert_close(getattr(result, name), getattr(exact, name), relative, name)
    assert torch.equal(result.l0.double(), exact.l0.double())
    assert torch.equal(result.fired, exact.fired)
    for name, gradient in gradients.named().items():
        assert_close(gradient, exact_gradients.named()[name], relative, name)


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float, name: str) -> None:
    """|found − expected| ≤ relative · max|expected|."""
    if expected.numel():
        scale = float(expected.double().abs().max()) + 1e-300
        assert float((found.double() - expected.double()).abs().max()) <= relative * scale, name
