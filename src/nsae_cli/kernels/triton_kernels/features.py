"""One program per feature: the entries by feature, the gradients, Adam, and the encoder's bfloat16 copy."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(
    col_ptr,
    order,
    entry_rows,
    delta,
    pull,
    dots,
    rows_out,
    delta_out,
    pull_out,
    sum_delta,
    sum_along,
    BLOCK: tl.constexpr,
):
    """Entries in the order of features, and Σ delta and Σ pull·dots of each feature in float64 [F].

    col_ptr: int64 [F + 1]; order: int64 [E], the entry at each place of the new order; entry_rows: int32 [E], delta,
    pull, dots [E] in the old order; `*_out` in the new one.
    """
    feature = tl.program_id(0)
    begin, end = tl.load(col_ptr + feature), tl.load(col_ptr + feature + 1)
    total_delta = tl.zeros((BLOCK,), dtype=tl.float64)
    total_along = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(begin, end, BLOCK):
        q = first + tl.arange(0, BLOCK)
        there = q < end
        entry = tl.load(order + q, mask=there, other=0)
        delta_here = tl.load(delta + entry, mask=there, other=0.0)
        pull_here = tl.load(pull + entry, mask=there, other=0.0)
        tl.store(rows_out + q, tl.load(entry_rows + entry, mask=there, other=0), mask=there)
        tl.store(delta_out + q, delta_here, mask=there)
        tl.store(pull_out + q, pull_here, mask=there)
        total_delta += delta_here.to(tl.float64)
        along = tl.load(dots + entry, mask=there, other=0.0).to(tl.float64)
        total_along += pull_here.to(tl.float64) * along
    tl.store(sum_delta + feature, tl.sum(total_delta, 0))
    tl.store(sum_along + feature, tl.sum(total_along, 0))


@triton.jit
def dense_slice(frequent, col_ptr, rows, delta, pull, dense_delta, dense_pull, B, F, BLOCK: tl.constexpr):
    """The entries of frequent features as matrices [H, B], zero where there is no entry (the caller's zeros).

    frequent: int64 [H], a feature, or F where there are fewer than H. A feature has one entry per row at most, so
    every element is written once.
    """
    slot = tl.program_id(0).to(tl.int64)
    feature = tl.load(frequent + slot)
    if feature < F:
        begin, end = tl.load(col_ptr + feature), tl.load(col_ptr + feature + 1)
        for first in range(begin, end, BLOCK):
            q = first + tl.arange(0, BLOCK)
            there = q < end
            row = tl.load(rows + q, mask=there, other=0)
            tl.store(dense_delta + slot * B + row, tl.load(delta + q, mask=there, other=0.0), mask=there)
            tl.store(dense_pull + slot * B + row, tl.load(pull + q, mask=there, other=0.0), mask=there)


@triton.jit
def _feature_gradients(
    feature,
    k,
    col_ptr,
    rows,
    delta,
    pull,
    x,
    error,
    slots,
    slot_enc,
    slot_dec,
    d,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Σ delta·x[row] and Σ pull·error[row] of one feature, [BD] each; a frequent feature's are taken from its slot."""
    inside = k < d
    begin, end = tl.load(col_ptr + feature), tl.load(col_ptr + feature + 1)
    enc = tl.zeros((BD,), dtype=tl.float32)
    dec = tl.zeros((BD,), dtype=tl.float32)
    if slots is not None:
        slot = tl.load(slots + feature).to(tl.int64)
        end = tl.where(slot < 0, end, begin)
        width = tl.where(slot < 0, 0, d)
        enc = tl.load(slot_enc + slot * d + k, mask=k < width, other=0.0)
        dec = tl.load(slot_dec + slot * d + k, mask=k < width, other=0.0)
    for first in range(begin, end, BE):
        q = first + tl.arange(0, BE)
        there = q < end
        at = tl.load(rows + q, mask=there, other=0).to(tl.int64)[:, None] * d + k[None, :]
        both = there[:, None] & inside[None, :]
        enc += tl.sum(tl.load(x + at, mask=both, other=0.0) * tl.load(delta + q, mask=there, other=0.0)[:, None], 0)
        dec += tl.sum(tl.load(error + at, mask=both, other=0.0) * tl.load(pull + q, mask=there, other=0.0)[:, None], 0)
    return enc, dec


@triton.jit
def gradients(
    col_ptr,
    rows,
    delta,
    pull,
    x,
    error,
    slots,
    slot_enc,
    slot_dec,
    along,
    decoder,
    grad_enc,
    grad_dec,
    d,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """grad_enc[j] = Σ delta·x[row], grad_dec[j] = Σ pull·error[row] + along[j]·W_dec[j]; all [F, d], overwritten.

    col_ptr: int64 [F + 1]; rows: int32 [E]; delta, pull: [E]; x, error: [B, d]; along: [F].
    slots: int32 [F], the row of slot_enc and slot_dec [H, d] that holds a frequent feature's sums, −1 for the others;
    or None, as slot_enc and slot_dec then.
    Dense equivalent: (xᵀ @ Δ)ᵀ and Pᵀ @ error + along·W_dec, with Δ and P the [B, F] matrices of delta and pull.
    """
    feature = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    enc, dec = _feature_gradients(
        feature, k, col_ptr, rows, delta, pull, x, error, slots, slot_enc, slot_dec, d, BD, BE
    )
    at = feature * d + k
    dec += tl.load(along + feature) * tl.load(decoder + at, mask=k < d, other=0.0)
    tl.store(grad_enc + at, enc, mask=k < d)
    tl.store(grad_dec + at, dec, mask=k < d)


@triton.jit
def _adam(
    at, inside, weights, gradient, first_moment, second_moment, gain1, beta2, gain2, eps, step_size, inverse_root
):
    """The new weights of Adam's step; stores the moments, leaves the weights to the caller.

    gain1 = 1 − β₁, gain2 = 1 − β₂ and the rest are `Adam.numbers`.
    """
    m = tl.load(first_moment + at, mask=inside, other=0.0)
    v = tl.load(second_moment + at, mask=inside, other=0.0)
    m += (gradient - m) * gain1
    v = v * beta2 + gradient * gradient * gain2
    tl.store(first_moment + at, m, mask=inside)
    tl.store(second_moment + at, v, mask=inside)
    return weights - tl.div_rn(step_size * m, tl.sqrt_rn(v) * inverse_root + eps)


@triton.jit
def _store_shadow(feature, at, inside, weights, copy, norm, rest, round_up, smallest):
    """The feature's row of `copy` (bfloat16 as int16), norm = ‖w‖ and rest = ‖w − copy‖, both rounded up.

    Rounded to nearest, ties to even, by integers: the bits are torch's own, also in Triton's interpreter, whose
    conversion cuts.
    """
    bits = weights.to(tl.int32, bitcast=True)
    nan = weights != weights
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    upper = tl.where(nan, 0x7FC0, upper)
    tl.store(copy + at, upper.to(tl.int16), mask=inside)
    off = weights - (upper << 16).to(tl.float32, bitcast=True)
    tl.store(norm + feature, tl.sqrt_rn(tl.sum(weights * weights, 0)) * round_up + smallest)
    tl.store(rest + feature, tl.sqrt_rn(tl.sum(off * off, 0)) * round_up + smallest)


@triton.jit
def shadow(encoder, copy, norm, rest, d, round_up, smallest, BD: tl.constexpr):
    """The encoder's bfloat16 copy [F, d] (as int16), norm and rest [F]: see `_store_shadow`. encoder: [F, d]."""
    feature = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    at = feature * d + k
    weights = tl.load(encoder + at, mask=k < d, other=0.0)
    _store_shadow(feature, at, k < d, weights, copy, norm, rest, round_up, smallest)


@triton.jit
def update(
    col_ptr,
    rows,
    delta,
    pull,
    x,
    error,
    slots,
    slot_enc,
    slot_dec,
    along,
    encoder,
    decoder,
    m_enc,
    v_enc,
    m_dec,
    v_dec,
    gain1,
    beta2,
    gain2,
    eps,
    step_size,
    inverse_root,
    copy,
    norm,
    rest,
    round_up,
    smallest,
    d,
    CONSTRAINT: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """The gradients of `gradients`, Adam's step, and the decoder's constraint: gradients never reach memory.

    encoder, decoder and the four moments: [F, d], updated in place. CONSTRAINT: 0 free, 1 rows scaled to norm 1,
    2 rows longer than 1 scaled to 1. copy, norm, rest: see `shadow`; copy None for none of them. Others: `gradients`.
    Dense equivalent: `Adam.step` on W_enc and W_dec, then `normalise_rows_` or `bound_rows_`.
    """
    feature = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    inside = k < d
    enc, dec = _feature_gradients(
        feature, k, col_ptr, rows, delta, pull, x, error, slots, slot_enc, slot_dec, d, BD, BE
    )
    at = feature * d + k
    w = tl.load(encoder + at, mask=inside, other=0.0)
    w = _adam(at, inside, w, enc, m_enc, v_enc, gain1, beta2, gain2, eps, step_size, inverse_root)
    tl.store(encoder + at, w, mask=inside)
    if copy is not None:
        _store_shadow(feature, at, inside, w, copy, norm, rest, round_up, smallest)
    w = tl.load(decoder + at, mask=inside, other=0.0)
    dec += tl.load(along + feature) * w
    w = _adam(at, inside, w, dec, m_dec, v_dec, gain1, beta2, gain2, eps, step_size, inverse_root)
    if CONSTRAINT > 0:
        length = tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1e-30)
        if CONSTRAINT == 2:
            length = tl.maximum(length, 1.0)
        w = tl.div_rn(w, length)
    tl.store(decoder + at, w, mask=inside)
