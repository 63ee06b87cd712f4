"""A trained sparse autoencoder, in units of the raw activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.kernels.types import Weights
from nsae_cli.sae.nonlinearity import NONLINEARITIES, Nonlinearity


@dataclass
class SparseAutoencoder:
    """x ↦ x̂: pre_acts = x @ W_enc + b_enc, acts = act(pre_acts), x̂ = acts @ W_dec + b_dec.

    b_dec is not subtracted from the input. Noise belongs to training only and is not here.

    Attributes:
        act: name of the activation, ``relu`` or ``tanh-relu``.
        weights: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in].
    """

    act: str
    weights: Weights

    @property
    def nonlinearity(self) -> Nonlinearity:
        return NONLINEARITIES[self.act]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.weights.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.weights.W_enc.shape[1]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """acts [..., d_sae] of x [..., d_in]."""
        return self.nonlinearity.value(x @ self.weights.W_enc + self.weights.b_enc)

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """x̂ [..., d_in] of acts [..., d_sae]."""
        return acts @ self.weights.W_dec + self.weights.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ [..., d_in] of x [..., d_in]."""
        return self.decode(self.encode(x))

    __call__ = forward

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        """The same SAE on another device."""
        return SparseAutoencoder(self.act, Weights(*(tensor.to(device) for tensor in self.weights.tensors())))


def _raw_factors(act: str, scale: float) -> tuple[float, float, float, float]:
    """What W_enc, b_enc, W_dec, b_dec of x' = scale·x are multiplied with to act on raw x.

    relu is homogeneous, so acts can be in units of x and unit rows stay unit: W_enc, b_enc/s, W_dec, b_dec/s.
    tanh-relu's acts are dimensionless: s·W_enc, b_enc, W_dec/s, b_dec/s.
    """
    if NONLINEARITIES[act].homogeneous:
        return 1.0, 1 / scale, 1.0, 1 / scale
    return scale, 1.0, 1 / scale, 1 / scale


def fold_input_scale(act: str, scaled: Weights, scale: float) -> Weights:
    """Weights for raw x from weights trained on x' = scale·x; float32."""
    return _multiply(scaled, _raw_factors(act, scale))


def unfold_input_scale(act: str, raw: Weights, scale: float) -> Weights:
    """The inverse of `fold_input_scale`; float32."""
    W_enc, b_enc, W_dec, b_dec = _raw_factors(act, scale)
    return _multiply(raw, (1 / W_enc, 1 / b_enc, 1 / W_dec, 1 / b_dec))


def _multiply(weights: Weights, factors: tuple[float, float, float, float]) -> Weights:
    # In float64, so that the one rounding is the last.
    products = (tensor.detach().double() * factor for tensor, factor in zip(weights.tensors(), factors, strict=True))
    return Weights(*(product.float() for product in products))
