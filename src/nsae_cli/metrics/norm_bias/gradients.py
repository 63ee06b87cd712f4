"""Whose gradient it is: closed-form gradient norms per row, their shares, and the projection of a group's gradient.

Per row the loss is w‖e‖² + b·S(f), with w = n^(−p) and b = β·n^(−q); z = pre_acts, f = act(z), d_i = row i of W_dec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nsae_cli.kernels.types import RowGradients, in_memory_order
from nsae_cli.metrics.groups import ALL, N_GROUPS, Scoped, group_sums, per_scope
from nsae_cli.metrics.undefined import ratio


def per_token_gradient_norms(
    *,
    encoder_input: Tensor,
    acts: Tensor,
    act_slope: Tensor,
    error: Tensor,
    W_dec: Tensor,
    error_weight: Tensor,
    sparsity_weight: Tensor,
    penalty_slope: Tensor,
    penalty_norm_slope: Tensor | None = None,
    unit_decoder: bool,
) -> tuple[Tensor, Tensor]:
    """‖∂L_t/∂W_enc‖ and ‖∂L_t/∂W_dec‖ (Frobenius) of each row's own loss L_t, without building any gradient.

    Encoder: δ_i = act'(z_i)·(2w e·d_i + b ∂S/∂f_i); the gradient is the outer product of the encoder's input and δ,
    so its norm is ‖x‖‖δ‖.

    Decoder: row i of the gradient is 2w f_i e + b s_i d_i/‖d_i‖ with s_i = ∂S/∂‖d_i‖. Hence, summed over i,

        free decoder   ‖·‖² = Σ ‖2w f_i e + b s_i d_i/‖d_i‖‖²
                       l1, s = 0: 2w‖f‖‖e‖;   l1-decoder-norm, s_i = f_i: √Σ f_i²‖2w e + b d_i/‖d_i‖‖²
        unit decoder   (rows of norm 1, gradient projected orthogonally to d_i, which removes any penalty's part)
                       2w √(‖f‖²‖e‖² − Σ f_i²(e·d_i)²)

    Args:
        encoder_input: what W_enc multiplies, [B, d_in]: x, or x − b_dec for an autoencoder that subtracts it.
        acts: f [B, d_sae].
        act_slope: act'(z) [B, d_sae].
        error: e = x_hat − x, [B, d_in].
        W_dec: [d_sae, d_in].
        error_weight: w [B].
        sparsity_weight: b = β·n^(−q) [B].
        penalty_slope: ∂S/∂f_i, broadcastable to [B, d_sae]: 1 for l1, ‖d_i‖ for l1-decoder-norm.
        penalty_norm_slope: ∂S/∂‖d_i‖ [B, d_sae], None if S does not read decoder norms; unused with a unit decoder.
        unit_decoder: rows of W_dec have norm 1 and the gradient is projected.

    Returns:
        Encoder and decoder norms, float64 [B] each.
    """
    error_along = (error @ W_dec.T).double()  # e·d_i
    acts = acts.double()
    w = error_weight.double()[:, None]
    b = sparsity_weight.double()[:, None]

    delta = act_slope * (2 * w * error_along + b * penalty_slope)
    encoder = torch.linalg.vector_norm(encoder_input, dim=1, dtype=torch.float64) * delta.norm(dim=1)

    error_sq = torch.linalg.vector_norm(error, dim=1, dtype=torch.float64).square()
    decoder_sq = 4 * w[:, 0] ** 2 * acts.square().sum(1) * error_sq
    if unit_decoder:
        decoder_sq = decoder_sq - 4 * w[:, 0] ** 2 * (acts * error_along).square().sum(1)
    elif penalty_norm_slope is not None:
        pull = b * penalty_norm_slope
        row_norm = torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float64)
        # A row of norm 0 has no direction, and autograd's subgradient of its norm is 0.
        cosine = torch.where(row_norm > 0, error_along / row_norm, 0.0)
        pull = torch.where(row_norm > 0, pull, 0.0)
        decoder_sq = decoder_sq + (4 * w * acts * pull * cosine + pull**2).sum(1)
    # Where the gradient vanishes the difference may round below 0.
    return encoder, decoder_sq.clamp(min=0).sqrt()


def gradient_norms(sums: RowGradients, input_norm: Tensor, unit_decoder: bool) -> dict[str, Tensor]:
    """The same norms from sums that a training step's kernel gave; float64 [B] by parameter name.

    ‖∂W_enc‖ = ‖x‖‖δ‖; ‖∂W_dec‖ = √(‖f‖²‖g‖² + 2Σ f_i a_i (g·d_i)/‖d_i‖ + Σ a_i²), g = 2w e and a_i = b ∂S/∂‖d_i‖, or
    with a unit decoder, whose rows have norm 1, √(‖f‖²‖g‖² − Σ f_i²(g·d_i)²).

    Args:
        sums: of the rows.
        input_norm: ‖x‖ of what W_enc multiplies, [B].
        unit_decoder: as above.
    """
    decoder_sq = sums.acts_sq.double() * sums.pull_sq.double()
    if unit_decoder:
        decoder_sq = decoder_sq - sums.along_sq.double()
    elif sums.norm_sq is not None and sums.norm_cross is not None:
        decoder_sq = decoder_sq + 2 * sums.norm_cross.double() + sums.norm_sq.double()
    encoder = input_norm.double() * sums.delta_sq.double().sqrt()
    return {"W_enc": encoder, "W_dec": decoder_sq.clamp(min=0).sqrt()}


class GradShare:
    """grad_share: a scope's sum ÷ the total of per-row gradient norms, for each named parameter; streaming."""

    def __init__(self) -> None:
        self._rows = torch.zeros(N_GROUPS, dtype=torch.int64)
        self._sums: dict[str, Tensor] = {}

    def update(self, norms: Mapping[str, Tensor], group: Tensor) -> None:
        """Adds rows: gradient norms [B] by parameter name, group int64 [B]."""
        self._rows += torch.bincount(group.cpu(), minlength=N_GROUPS)
        for name, values in norms.items():
            sums = group_sums(values[:, None], group)[:, 0]
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def compute(self) -> dict[str, Scoped[float | None]]:
        """{parameter: share in each scope}; None for a scope without rows or if every gradient is 0."""
        return {name: self._shares(sums) for name, sums in self._sums.items()}

    def _shares(self, sums: Tensor) -> Scoped[float | None]:
        total = sums[ALL].sum().item()

        def share(groups: slice) -> float | None:
            return ratio(sums[groups].sum().item(), total) if self._rows[groups].any() else None

        return per_scope(share)


def group_gradient_projection(
    group_gradients: Sequence[Mapping[str, Tensor] | None], total: Mapping[str, Tensor], total_sq: float | None = None
) -> list[float | None]:
    """G_b = ⟨g_b, g⟩ / ‖g‖² for each group's gradient g_b; ΣG_b = 1 where the g_b add up to g.

    A negative G_b: the group's rows pull against the step that is taken.

    Args:
        group_gradients: per group the gradients by parameter name of its rows' part of the batch loss, before clipping;
            None for a group without rows. Whether the decoder's projection was taken of them does not matter: what it
            removes is perpendicular to the projected whole.
        total: g, the gradients of the whole batch loss by the same names, after the projection.
        total_sq: ‖g‖², where it is known already.

    Returns:
        One number per group; None where g_b is None, or all None if g = 0.
    """
    total_sq = squared_norm(total) if total_sq is None else total_sq
    return [None if g is None else ratio(inner_product(g, total), total_sq) for g in group_gradients]


def squared_norm(gradients: Mapping[str, Tensor]) -> float:
    """‖g‖² over all parameters."""
    return inner_product(gradients, gradients)


def inner_product(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Σ a·b over all parameters: along the last axis in memory in their own dtype, the rest in float64."""
    if a.keys() != b.keys():
        raise ValueError(f"gradients of {sorted(a)} cannot be compared with gradients of {sorted(b)}")
    total = 0.0
    for name, tensor in a.items():
        x, y = in_memory_order(tensor), in_memory_order(b[name])
        if x.shape != y.shape:  # laid out differently
            x, y = tensor, b[name]
        products = torch.linalg.vecdot(x, y) if x.ndim > 1 else x.double() * y.double()
        total += products.double().sum().item()
    return total
