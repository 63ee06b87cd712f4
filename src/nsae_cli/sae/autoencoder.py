"""A trained sparse autoencoder, in units of the raw activations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch

from nsae_cli.kernels.selection import row_top_k
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.nonlinearity import JumpRelu, Nonlinearity, is_homogeneous, make_nonlinearity


class Autoencoder(Protocol):
    """What measurements need of an autoencoder: one of nsae's own, or one from elsewhere that computes otherwise."""

    @property
    def d_in(self) -> int: ...

    @property
    def d_sae(self) -> int: ...

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """acts ≥ 0 [..., d_sae] and x̂ [..., d_in] of raw x [..., d_in]."""


@dataclass
class SparseAutoencoder:
    """x ↦ x̂: pre_acts = x @ W_enc + b_enc, acts = act(pre_acts), x̂ = acts @ W_dec + b_dec.

    b_dec is not subtracted from the input. Noise belongs to training only and is not here.

    Attributes:
        act: name of the activation: ``relu``, ``tanh-relu``, ``topk`` or ``jumprelu``. A batchtopk SAE is a jumprelu
            one with the same threshold everywhere.
        weights: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in].
        k: of topk.
        threshold: of jumprelu [d_sae]: acts are 0 up to it.
    """

    act: str
    weights: Weights
    k: int | None = None
    threshold: torch.Tensor | None = None

    @property
    def nonlinearity(self) -> Nonlinearity:
        return JumpRelu.fixed() if self.act == "jumprelu" else make_nonlinearity(self.act, self.k)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.weights.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.weights.W_enc.shape[1]

    def named(self) -> dict[str, torch.Tensor]:
        """The tensors that are saved, by name."""
        return self.weights.named() | ({} if self.threshold is None else {"threshold": self.threshold})

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """acts [..., d_sae] of x [..., d_in]."""
        pre_acts = x @ self.weights.W_enc + self.weights.b_enc
        if self.k is not None:
            rows = pre_acts.reshape(-1, self.d_sae)
            pre_acts = torch.where(row_top_k(rows, self.k).view_as(pre_acts), pre_acts, 0.0)
        if self.threshold is not None:
            pre_acts = torch.where(pre_acts <= self.threshold, 0.0, pre_acts)
        return self.nonlinearity.value(pre_acts)

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """x̂ [..., d_in] of acts [..., d_sae]."""
        return acts @ self.weights.W_dec + self.weights.b_dec

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """acts [..., d_sae] and x̂ [..., d_in] of x [..., d_in]."""
        acts = self.encode(x)
        return acts, self.decode(acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ [..., d_in] of x [..., d_in]."""
        return self.decode(self.encode(x))

    __call__ = forward

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        """The same SAE on another device."""
        return dataclasses.replace(
            self,
            weights=Weights(*(tensor.to(device) for tensor in self.weights.tensors())),
            threshold=None if self.threshold is None else self.threshold.to(device),
        )


def _raw_factors(act: str, scale: float) -> tuple[float, float, float, float, float]:
    """What W_enc, b_enc, W_dec, b_dec, θ of x' = scale·x are multiplied with to act on raw x.

    relu, of all entries or of some, is homogeneous, so acts can be in units of x and unit rows stay unit: W_enc,
    b_enc/s, W_dec, b_dec/s, θ/s. tanh-relu's acts are dimensionless: s·W_enc, b_enc, W_dec/s, b_dec/s.
    """
    if is_homogeneous(act):
        return 1.0, 1 / scale, 1.0, 1 / scale, 1 / scale
    return scale, 1.0, 1 / scale, 1 / scale, 1.0


def fold_input_scale(act: str, scaled: Weights, scale: float) -> Weights:
    """Weights for raw x from weights trained on x' = scale·x; float32."""
    return _multiply(scaled, _raw_factors(act, scale))


def unfold_input_scale(act: str, raw: Weights, scale: float) -> Weights:
    """The inverse of `fold_input_scale`; float32."""
    return _multiply(raw, _raw_factors(act, 1 / scale))


def _multiply(weights: Weights, factors: tuple[float, float, float, float, float]) -> Weights:
    # In float64, so that the one rounding is the last.
    tensors = (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec)
    products = (tensor.detach().double() * factor for tensor, factor in zip(tensors, factors[:4], strict=True))
    W_enc, b_enc, W_dec, b_dec = (product.float() for product in products)
    log_threshold = weights.log_threshold
    if log_threshold is not None:
        log_threshold = (log_threshold.detach().double().exp() * factors[4]).log().float()
    return Weights(W_enc, b_enc, W_dec, b_dec, log_threshold)
