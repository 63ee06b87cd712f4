"""SAEs that normalise or centre each row before they encode it and undo that after decoding.

No weights of a plain SAE can express it: what is done depends on the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nsae_cli.sae.autoencoder import Autoencoder, SparseAutoencoder

RowNorm = Literal["layer_norm", "constant_norm_rescale"]

#: Added to the standard deviation, as SAELens and OpenAI do it.
_LAYER_NORM_EPS = 1e-5


@dataclass
class RowNormalizedAutoencoder:
    """x ↦ x̂ with x' = (x − m)/(s + ε), (acts, x̂') = inner(x'), x̂ = x̂'·s + m per row.

    ``layer_norm``: m the row's mean, s its standard deviation (with d_in − 1), ε = 1e-5; x̂ is not scaled by ε.
    ``constant_norm_rescale``: m = 0, s = ‖x‖/√d_in, ε = 0. A row of zeros stays a row of zeros.

    Attributes:
        inner: works on the normalised rows.
        scheme: what is done to a row.
    """

    inner: SparseAutoencoder
    scheme: RowNorm

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.inner.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.inner.d_sae

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """acts [..., d_sae] of the normalised rows, and x̂ [..., d_in] of raw x [..., d_in]."""
        if self.scheme == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            centred = x - mean
            scale = centred.std(dim=-1, keepdim=True)
            acts, x_hat = self.inner.reconstruct(centred / (scale + _LAYER_NORM_EPS))
            return acts, x_hat * scale + mean
        # Divided by the norm in this order, since ‖x‖/√d_in would be rounded once more.
        to_unit = self.d_in**0.5 / x.norm(dim=-1, keepdim=True)
        to_unit = torch.where(torch.isfinite(to_unit), to_unit, 1.0)
        acts, x_hat = self.inner.reconstruct(x * to_unit)
        return acts, x_hat / to_unit

    def to(self, device: torch.device | str) -> RowNormalizedAutoencoder:
        """The same on another device."""
        return RowNormalizedAutoencoder(self.inner.to(device), self.scheme)


@dataclass
class RowCentredAutoencoder:
    """x ↦ inner(x − m) + m with m the row's mean over d_in: for an SAE that was trained on centred activations.

    TransformerLens' ``center_writing_weights`` takes the mean over d_model out of everything that is written to the
    residual stream. LayerNorm does not see it, so the model computes the same; an SAE does see it.
    """

    inner: Autoencoder

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.inner.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.inner.d_sae

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """acts [..., d_sae] of the centred rows, and x̂ [..., d_in] of raw x [..., d_in]."""
        mean = x.mean(dim=-1, keepdim=True)
        acts, x_hat = self.inner.reconstruct(x - mean)
        return acts, x_hat + mean


#: From which share of Σ‖x‖² the rows' means are worth looking at; x̂ has none if less than so much of theirs is left.
_MEANS_MATTER, _NO_MEAN_BELOW = 1e-3, 0.02
#: x̂ must have at least so much of Σ‖x‖²: nothing follows from the mean of what is hardly there.
_RECONSTRUCTS = 0.25


@torch.no_grad()
def reconstructs_centred(sae: Autoencoder, x: torch.Tensor) -> bool:
    """Whether an SAE shows the mark of centred activations: x̂ has no mean over d_in although x [B, d_in] has."""
    _, x_hat = sae.reconstruct(x)
    total, means = x.square().sum(), x.shape[-1] * x.mean(dim=-1).square().sum()
    if means < _MEANS_MATTER * total or x_hat.square().sum() < _RECONSTRUCTS * total:
        return False
    return bool(x.shape[-1] * x_hat.mean(dim=-1).square().sum() < _NO_MEAN_BELOW * means)
