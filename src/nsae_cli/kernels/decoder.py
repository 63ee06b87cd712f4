"""What is done to gradients and to W_dec's rows around an optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsae_cli.kernels.types import Weights


@torch.no_grad()
def remove_parallel_component_(gradient: torch.Tensor, W_dec: torch.Tensor) -> None:
    """gradient_i −= ⟨gradient_i, d_i⟩ d_i for unit rows d_i, so that a step is tangent to the sphere. Both [F, d]."""
    along = torch.linalg.vecdot(gradient, W_dec)
    gradient.addcmul_(W_dec, along[:, None], value=-1)


@torch.no_grad()
def normalise_rows_(W_dec: torch.Tensor) -> None:
    """d_i ← d_i/‖d_i‖. [F, d]"""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-30))


@torch.no_grad()
def bound_rows_(W_dec: torch.Tensor, bound: float = 1.0) -> None:
    """d_i ← d_i·min(1, bound/‖d_i‖). [F, d]"""
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-30)
    W_dec.mul_((bound / norms).clamp_max_(1.0))


@torch.no_grad()
def gradient_norm(gradients: Weights) -> torch.Tensor:
    """‖g‖ over all gradients together."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.tensors()]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_norm_(gradients: Weights, largest: float, norm: Callable[[Weights], torch.Tensor] = gradient_norm) -> None:
    """g ← g·min(1, largest/‖g‖); `norm` says what ‖g‖ is where not all gradients are here."""
    factor = (largest / norm(gradients).clamp_min(1e-30)).clamp_max(1.0)
    for gradient in gradients.tensors():
        gradient.mul_(factor)
