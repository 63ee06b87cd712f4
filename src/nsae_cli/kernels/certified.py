"""The certified bfloat16 encoder: one bf16 product, a rigorous bound on its error, and no active feature missed.

An entry (row i, feature j) is active where z = x·w + b (+ noise) > t, evaluated in float32. Let c be any vector
(b_dec here: it makes y short), y = fl(x − c), ŷ and ŵ the bf16 roundings of y and w, and u = 2⁻²⁴. Then

    x·w = c·w + (x − c)·w
        = c·w + ŷ·ŵ + (y − ŷ)·w + ŷ·(w − ŵ) + (x − c − y)·w

so that, by Cauchy–Schwarz with the rounding residuals as they really are, not as they might be at worst,

    |x·w − c·w − ŷ·ŵ| ≤ ‖y − ŷ‖‖w‖ + ‖ŷ‖‖w − ŵ‖ + u‖y‖‖w‖.

The products of bf16 numbers are exact in float32. The hardware adds them up in float32 in some order, perhaps cutting
instead of rounding: error ≤ 2u·d·Σ|ŷ_k ŵ_k| ≤ 2u·d‖ŷ‖‖ŵ‖, and ‖ŵ‖ ≤ ‖w‖ + ‖w − ŵ‖. The result z̃ is rounded to bf16:
error ≤ 2⁻⁸|z̃|. c·w is itself a float32 sum, off by at most u·(d + 1)‖c‖‖w‖; and the float32 evaluation of z that
decides is off by at most u·(d + 3)‖x‖‖w‖ + u·(|b| + |noise|) + u|z|, whatever its order. Subnormal numbers that
hardware takes for zero change each of the d products by at most 2⁻¹²⁶·(|ŷ_k| + |ŵ_k|) and round results by 2⁻¹²⁶.
Everything that has to do with row i alone is in A_i, C_i and `slack`, so that the test of an entry is

    z̃ + (b + c·w) + noise + A_i‖w‖ + C_i‖w − ŵ‖ + r|z̃| + 2⁻²⁰(|b + c·w| + |noise|) > t − slack
    A_i = ‖y − ŷ‖ + 2u(d + 8)‖ŷ‖ + u(d + 8)(‖x‖ + ‖c‖) + 2u‖y‖,   C_i = (1 + 2u(d + 8))‖ŷ‖,   r = 2⁻⁸ + 2⁻²⁰.

The parts with 2⁻²⁰ pay for the float32 arithmetic of the test itself, and all norms are rounded up. An entry that
passes is evaluated in float32 from x and w themselves: the active set and its values are those of float32. About 1.2
to 1.4 entries are evaluated for one that is active. The test is one-sided: what fails it is active in no evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_U = 2.0**-24
_OF_TEST = 2.0**-20
#: r of the test: the result's rounding to bfloat16 and the test's own float32 arithmetic.
RELATIVE = 2.0**-8 + _OF_TEST
#: Norms are float32 sums: relative error below (d/2 + 2)·u, and below this for d up to 2¹³; longer rows are summed in
#: parts by torch, with less error.
_ROUND_UP = 1 + 2.0**-10
_SMALLEST = 2.0**-126


@dataclass(frozen=True)
class RoundedRows:
    """A batch in bfloat16 with the row's parts of the bound.

    Attributes:
        rows: ŷ, bfloat16 [B, d]
        row_a: A_i, float32 [B]
        row_b: C_i, float32 [B]
        slack: float32 [B]
    """

    rows: torch.Tensor
    row_a: torch.Tensor
    row_b: torch.Tensor
    slack: torch.Tensor


def round_rows(x: torch.Tensor, centre: torch.Tensor) -> RoundedRows:
    """Rounds x − centre to bfloat16. x: float32 [B, d], centre: float32 [d]."""
    d = x.shape[1]
    y = x - centre
    rounded = y.bfloat16()
    back = rounded.float()
    norm = torch.linalg.vector_norm

    def upper(rows: torch.Tensor) -> torch.Tensor:
        # Squares of numbers below 2⁻⁶³ vanish in float32; √d times that covers them.
        return norm(rows, dim=1) * _ROUND_UP + d**0.5 * 2.0**-62

    y_norm, back_norm = upper(y), upper(back)
    row_a = upper(y - back) + 2 * _U * (d + 8) * back_norm + 2 * _U * y_norm
    row_a += _U * (d + 8) * (upper(x) + float(norm(centre)) * _ROUND_UP)
    # |ŷ_k| ≤ ‖ŷ‖ and |ŵ_k| ≤ ‖w‖: the latter's part is in row_a.
    slack = d * _SMALLEST * (back_norm + 2)
    row_a += d * _SMALLEST
    return RoundedRows(rounded, row_a * _ROUND_UP, back_norm * (1 + 2 * _U * (d + 8)) * _ROUND_UP, slack)


def bias_of_test(encoder: torch.Tensor, b_enc: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """b + c·w and 2⁻²⁰ of its size, float32 [F]. encoder: float32 [F, d]."""
    bias = torch.addmv(b_enc, encoder, centre)
    return bias + bias.abs() * _OF_TEST


def has_bf16_products() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX-512 BF16 or AMX); else the bf16 product is slow."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())
