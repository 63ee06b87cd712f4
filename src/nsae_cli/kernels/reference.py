"""The training step's loss and gradients in plain torch autograd: slow, and the standard for every other kernel."""

from __future__ import annotations

from typing import Any

import torch

from nsae_cli.kernels.distance import SQUARED_ERROR
from nsae_cli.kernels.types import Activation, Distance, Penalty, Selection, StepResult, Weights


def step_gradients(
    x: torch.Tensor,
    weights: Weights,
    gradients: Weights,
    *,
    activation: Activation,
    penalty: Penalty,
    error_weight: torch.Tensor,
    sparsity_weight: torch.Tensor,
    noise: torch.Tensor | None = None,
    distance: Distance = SQUARED_ERROR,
) -> StepResult:
    """Loss terms and gradients of L = Σ_rows [error_weight·D(x, x̂) + sparsity_weight·S(acts)], D = ‖x̂ − x‖² mostly.

    pre_acts = x @ W_enc + b_enc + noise, acts = act(pre_acts), x̂ = acts @ W_dec + b_dec.

    Args:
        x: inputs [B, d]; its dtype is the dtype of the computation.
        weights: the parameters, same dtype.
        gradients: receives ∂L/∂parameter, overwritten.
        activation: the activation.
        penalty: the sparsity penalty S.
        error_weight: [B], the mean over rows already in it (w/B).
        sparsity_weight: [B], likewise (β·v/B).
        noise: added to the pre-activations [B, F], or None.
        distance: D.
    """
    selection = activation.selection
    with torch.enable_grad():
        leaves = Weights(*(tensor.detach().clone().requires_grad_() for tensor in weights.tensors()))
        pre_acts = x @ leaves.W_enc + leaves.b_enc
        if noise is not None:
            pre_acts = pre_acts + noise
        jumps = 0.0
        if selection.bandwidth is not None:
            assert leaves.log_threshold is not None
            threshold = leaves.log_threshold.exp()
            # Of what is above a positive threshold `activation` is the identity; its slope of 0 elsewhere must not
            # keep ∂L/∂acts from an entry just below.
            acts = _Jump.apply(pre_acts, threshold, selection.bandwidth)
            if penalty.jump:
                # The penalty's value counts these already: only the derivative of the step is wanted here.
                step = _Step.apply(pre_acts, threshold, selection.bandwidth)
                jumps = penalty.jump * (step - step.detach()).sum(dim=1)
        else:
            acts = activation.value(torch.where(_selected(pre_acts.detach(), selection), pre_acts, 0.0))
        x_hat = acts @ leaves.W_dec + leaves.b_dec
        distances = distance.value(x, x_hat)
        norms = torch.linalg.vector_norm(leaves.W_dec, dim=1) if penalty.uses_decoder_norms else None
        penalties = penalty.value(acts, norms).sum(dim=1) + jumps
        loss = (error_weight * distances + sparsity_weight * penalties).sum()
        loss.backward()
    for target, leaf in zip(gradients.tensors(), leaves.tensors(), strict=True):
        target.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    acts = acts.detach()
    positive = acts[acts > 0]
    error = (x_hat - x).detach()
    return StepResult(
        error=error,
        sq_error=error.square().sum(dim=1),
        distance=distances.detach(),
        penalty=penalties.detach(),
        l0=(acts > 0).sum(dim=1).to(x.dtype),
        l1=acts.sum(dim=1),
        fired=(acts > 0).any(dim=0),
        least_act=torch.cat([positive, acts.new_tensor([torch.inf])]).min() if selection.over == "batch" else None,
    )


def _selected(pre_acts: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Which entries may be active, by a stable sort: bool [B, F]."""
    if selection.top_k is None:
        return torch.ones_like(pre_acts, dtype=torch.bool)
    by_row = selection.over == "row"
    ranked = pre_acts if by_row else pre_acts.reshape(1, -1)
    most = selection.top_k if by_row else selection.top_k * len(pre_acts)
    best = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :most]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, best, True).view_as(pre_acts)


class _Jump(torch.autograd.Function):
    """z·H(z − θ) with the pseudo-derivative in θ of `jump`."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: Any, *pulls: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        density = _density(z, threshold, ctx.bandwidth)
        return pulls[0] * (z > threshold), -(threshold * density * pulls[0]).sum(dim=0), None


class _Step(torch.autograd.Function):
    """H(z − θ) with the pseudo-derivative in θ of `jump`."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *pulls: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, threshold = ctx.saved_tensors
        return None, -(_density(z, threshold, ctx.bandwidth) * pulls[0]).sum(dim=0), None


def _density(z: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """K((z − θ)/ε)/ε, K the rectangle of height and width 1."""
    if bandwidth == 0:
        return torch.zeros_like(z)
    u = (z - threshold) / bandwidth
    return ((u > -0.5) & (u < 0.5)).to(z.dtype) / bandwidth
