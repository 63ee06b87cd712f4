"""One program per row: exact evaluation of candidates, the decoder, sums over a row's entries."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def evaluate(
    x,
    encoder,
    bias,
    noise,
    threshold,
    row_ptr,
    candidates,
    capacity,
    kept_counts,
    kept_cols,
    kept_values,
    F,
    d,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Candidates of each row that exceed the threshold in float32, to the front of the row's part of `kept_*`.

    row_ptr: int64 [B + 1] of the candidates; candidates: int32 [capacity], in order; kept_counts: int32 [B];
    kept_cols, kept_values: [capacity].
    Dense equivalent: z = x @ encoder.T + bias (+ noise) at the candidates, those with not (z ≤ threshold).
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    x_row = tl.load(x + row * d + k, mask=k < d, other=0.0)[None, :]
    begin = tl.load(row_ptr + row)
    end = tl.minimum(tl.load(row_ptr + row + 1), capacity)
    done = tl.zeros((), dtype=tl.int32)
    for first in range(begin, end, BE):
        q = first + tl.arange(0, BE)
        there = q < end
        cols = tl.load(candidates + q, mask=there, other=0)
        weights = tl.load(
            encoder + cols.to(tl.int64)[:, None] * d + k[None, :], mask=there[:, None] & (k < d)[None, :], other=0.0
        )
        value = tl.sum(weights * x_row, 1) + tl.load(bias + cols, mask=there, other=0.0)
        if noise is not None:
            value += tl.load(noise + row * F + cols, mask=there, other=0.0)
        kept = there & ((value > threshold) | (value != value))
        number = kept.to(tl.int32)
        to = begin + done + tl.cumsum(number, 0) - number
        tl.store(kept_cols + to, cols, mask=kept)
        tl.store(kept_values + to, value, mask=kept)
        done += tl.sum(number, 0)
    tl.store(kept_counts + row, done)


@triton.jit
def close_gaps(from_ptr, to_ptr, from_cols, from_values, capacity, cols, values, BLOCK: tl.constexpr):
    """cols[to_ptr[i] + q] = from_cols[from_ptr[i] + q] for the to_ptr[i + 1] − to_ptr[i] entries of row i, and values.

    from_ptr, to_ptr: int64 [B + 1]; all others [capacity].
    """
    row = tl.program_id(0)
    source = tl.load(from_ptr + row)
    begin, end = tl.load(to_ptr + row), tl.minimum(tl.load(to_ptr + row + 1), capacity)
    for first in range(begin, end, BLOCK):
        q = first + tl.arange(0, BLOCK)
        there = (q < end) & (source + q - begin < capacity)
        tl.store(cols + q, tl.load(from_cols + source + q - begin, mask=there, other=0), mask=there)
        tl.store(values + q, tl.load(from_values + source + q - begin, mask=there, other=0.0), mask=there)


@triton.jit
def decode(
    row_ptr,
    cols,
    acts,
    decoder,
    b_dec,
    x,
    error,
    sq_error,
    dots,
    d,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """error = acts @ W_dec + b_dec − x [B, d], sq_error = ‖error‖² [B], dots = error[row]·W_dec[col] [E].

    row_ptr: int64 [B + 1]; cols: int32 [E]; acts: [E]; decoder: [F, d]. The second pass over a row's entries finds the
    decoder's rows in cache.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BD)
    inside = k < d
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    sum_here = tl.load(b_dec + k, mask=inside, other=0.0) - tl.load(x + row * d + k, mask=inside, other=0.0)
    for first in range(begin, end, BE):
        q = first + tl.arange(0, BE)
        there = q < end
        at = decoder + tl.load(cols + q, mask=there, other=0).to(tl.int64)[:, None] * d + k[None, :]
        weights = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
        sum_here += tl.sum(weights * tl.load(acts + q, mask=there, other=0.0)[:, None], 0)
    tl.store(error + row * d + k, sum_here, mask=inside)
    tl.store(sq_error + row, tl.sum(sum_here * sum_here, 0))
    for first in range(begin, end, BE):
        q = first + tl.arange(0, BE)
        there = q < end
        at = decoder + tl.load(cols + q, mask=there, other=0).to(tl.int64)[:, None] * d + k[None, :]
        weights = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
        tl.store(dots + q, tl.sum(weights * sum_here[None, :], 1), mask=there)


@triton.jit
def row_sums(row_ptr, values, sums, BLOCK: tl.constexpr):
    """sums[i] = Σ values over row i's entries [B], added up in float64. row_ptr: int64 [B + 1]; values: [E]."""
    row = tl.program_id(0)
    begin, end = tl.load(row_ptr + row), tl.load(row_ptr + row + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(begin, end, BLOCK):
        q = first + tl.arange(0, BLOCK)
        total += tl.load(values + q, mask=q < end, other=0.0).to(tl.float64)
    tl.store(sums + row, tl.sum(total, 0).to(tl.float32))
