"""The training step's loss and gradients in plain torch autograd: slow, and the standard for every other kernel."""

from __future__ import annotations

import torch

from nsae_cli.kernels.types import Activation, Penalty, StepResult, Weights


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
) -> StepResult:
    """Loss terms and gradients of L = Σ_rows [error_weight·‖x̂ − x‖² + sparsity_weight·S(acts)].

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
    """
    with torch.enable_grad():
        leaves = Weights(*(tensor.detach().clone().requires_grad_() for tensor in weights.tensors()))
        pre_acts = x @ leaves.W_enc + leaves.b_enc
        if noise is not None:
            pre_acts = pre_acts + noise
        acts = activation.value(pre_acts)
        x_hat = acts @ leaves.W_dec + leaves.b_dec
        sq_error = (x_hat - x).square().sum(dim=1)
        norms = torch.linalg.vector_norm(leaves.W_dec, dim=1) if penalty.uses_decoder_norms else None
        penalties = penalty.value(acts, norms).sum(dim=1)
        loss = (error_weight * sq_error + sparsity_weight * penalties).sum()
        loss.backward()
    for target, leaf in zip(gradients.tensors(), leaves.tensors(), strict=True):
        target.copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    acts = acts.detach()
    return StepResult(
        error=(x_hat - x).detach(),
        sq_error=sq_error.detach(),
        penalty=penalties.detach(),
        l0=(acts > 0).sum(dim=1).to(x.dtype),
        l1=acts.sum(dim=1),
        fired=(acts > 0).any(dim=0),
    )
