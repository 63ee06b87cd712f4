"""Which entries of x @ W_enc exceed the threshold: a matrix product whose result never reaches memory.

A tile is BM rows × BN features. Tiles are counted from row block to row block first: neighbours in time share a tile of
W_enc, which is read from memory once, and x as a whole stays in a GPU's second-level cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(
    x,
    encoder,
    bias,
    noise,
    row_a,
    row_c,
    slack,
    norm,
    rest,
    threshold,
    of_test,
    B,
    F,
    d,
    tile_row,
    tile_col,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CERTIFIED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows [BM], features [BN], values z [BM, BN] and wanted, int32 [BM, BN], of one tile.

    Dense equivalent: z = x @ encoder.T + bias (+ noise), wanted = not (z ≤ threshold): a NaN is an entry, so that it is
    found and not lost. CERTIFIED: x and encoder are bfloat16 and wanted is the test of `certified.py`. The accumulator
    is not rounded to bfloat16, so its r|z̃| shrinks to what the test's own arithmetic needs (`of_test`).
    """
    rows = tile_row * BM + tl.arange(0, BM)
    cols = tile_col * BN + tl.arange(0, BN)
    row_inside = rows < B
    col_inside = cols < F
    x_rows = x + rows.to(tl.int64)[:, None] * d
    encoder_cols = encoder + cols.to(tl.int64)[None, :] * d
    z = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, d, BK):
        k = first + tl.arange(0, BK)
        a = tl.load(x_rows + k[None, :], mask=row_inside[:, None] & (k < d)[None, :], other=0.0)
        b = tl.load(encoder_cols + k[:, None], mask=col_inside[None, :] & (k < d)[:, None], other=0.0)
        if WIDEN:  # the interpreter multiplies no bfloat16; the products are exact in float32 either way
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision="ieee")
    b_cols = tl.load(bias + cols, mask=col_inside, other=0.0)[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    value = z + b_cols
    size = tl.abs(z) + tl.abs(b_cols)
    if noise is not None:
        here = tl.load(noise + rows.to(tl.int64)[:, None] * F + cols[None, :], mask=inside, other=0.0)
        value += here
        size += tl.abs(here)
    if CERTIFIED:
        value += tl.load(row_a + rows, mask=row_inside, other=0.0)[:, None] * tl.load(
            norm + cols, mask=col_inside, other=0.0
        )
        value += tl.load(row_c + rows, mask=row_inside, other=0.0)[:, None] * tl.load(
            rest + cols, mask=col_inside, other=0.0
        )
        value += size * of_test
        value += tl.load(slack + rows, mask=row_inside, other=0.0)[:, None]
    wanted = (inside & ((value > threshold) | (value != value))).to(tl.int32)
    return rows, cols, value, wanted


@triton.jit
def find_reserved(
    x,
    encoder,
    bias,
    noise,
    row_a,
    row_c,
    slack,
    norm,
    rest,
    threshold,
    of_test,
    B,
    F,
    d,
    tiles_down,
    tiles_across,
    tile_counts,
    taken,
    capacity,
    staged_places,
    staged_cols,
    staged_values,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CERTIFIED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Writes entries wherever there is room; `place` puts them in order.

    Every tile takes room for its entries by one atomic addition to `taken` [1] (0 before), so where they are staged
    differs from run to run. What is staged does not: the column, the value (float32 only), and row·BN + the rank within
    the row's part of the tile, from which `place` finds the one place that an entry has.
    tile_counts: int32 [B, tiles_across], entries per row and tile, complete even where `capacity` is exceeded; entries
    beyond it are dropped.
    """
    tile = tl.program_id(0)
    tile_row, tile_col = tile % tiles_down, tile // tiles_down
    rows, cols, value, wanted = _tile(
        x,
        encoder,
        bias,
        noise,
        row_a,
        row_c,
        slack,
        norm,
        rest,
        threshold,
        of_test,
        B,
        F,
        d,
        tile_row,
        tile_col,
        BM,
        BN,
        BK,
        CERTIFIED,
        WIDEN,
    )
    counts = tl.sum(wanted, 1)
    tl.store(tile_counts + rows.to(tl.int64) * tiles_across + tile_col, counts, mask=rows < B)
    before = tl.cumsum(counts, 0) - counts
    ranks = tl.cumsum(wanted, 1) - wanted
    total = tl.sum(counts, 0)
    if total > 0:
        start = tl.atomic_add(taken, total)
        to = start + before[:, None] + ranks
        kept = (wanted > 0) & (to < capacity)
        tl.store(staged_places + to, rows[:, None] * BN + ranks, mask=kept)
        tl.store(staged_cols + to, tl.broadcast_to(cols[None, :], (BM, BN)), mask=kept)
        if not CERTIFIED:
            tl.store(staged_values + to, value, mask=kept)


@triton.jit
def place(
    tile_ptr,
    staged_places,
    staged_cols,
    staged_values,
    cols,
    values,
    taken,
    capacity,
    tiles_across,
    BN: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves staged entries to their places in the order of rows and columns.

    tile_ptr: int64 [B·tiles_across + 1], the running sum of `tile_counts`. cols, values [capacity] are written.
    Dense equivalent: a sort by (row, column), of entries that are sorted within each tile already.
    """
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (q < tl.load(taken)) & (q < capacity)
    in_tile = tl.load(staged_places + q, mask=there, other=0)
    col = tl.load(staged_cols + q, mask=there, other=0)
    row_part = (in_tile // BN).to(tl.int64) * tiles_across + col // BN
    to = tl.load(tile_ptr + row_part, mask=there, other=0).to(tl.int32) + in_tile % BN
    there = there & (to < capacity)
    tl.store(cols + to, col, mask=there)
    if HAS_VALUES:
        tl.store(values + to, tl.load(staged_values + q, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["write"])
def find_in_two_passes(
    x,
    encoder,
    bias,
    noise,
    row_a,
    row_c,
    slack,
    norm,
    rest,
    threshold,
    of_test,
    B,
    F,
    d,
    tiles_down,
    tiles_across,
    tile_counts,
    tile_ptr,
    capacity,
    cols_out,
    values_out,
    write,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CERTIFIED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The same without atomics: write = 0 counts each row's entries of each tile, write = 1 puts them in their places.

    The product is computed in both passes: it costs a second product and no [B, F] in memory. `write` is an argument
    of one compiled kernel and not a variant of it, so that both passes round alike and cannot disagree.
    tile_counts: int32 [B, tiles_across], written by the first pass; tile_ptr: its running sum, for the second.
    """
    tile = tl.program_id(0)
    tile_row, tile_col = tile % tiles_down, tile // tiles_down
    rows, cols, value, wanted = _tile(
        x,
        encoder,
        bias,
        noise,
        row_a,
        row_c,
        slack,
        norm,
        rest,
        threshold,
        of_test,
        B,
        F,
        d,
        tile_row,
        tile_col,
        BM,
        BN,
        BK,
        CERTIFIED,
        WIDEN,
    )
    place_of_row = rows.to(tl.int64) * tiles_across + tile_col
    if write == 0:
        tl.store(tile_counts + place_of_row, tl.sum(wanted, 1), mask=rows < B)
    else:
        start = tl.load(tile_ptr + place_of_row, mask=rows < B, other=0).to(tl.int32)
        to = start[:, None] + tl.cumsum(wanted, 1) - wanted
        kept = (wanted > 0) & (to < capacity)
        tl.store(cols_out + to, tl.broadcast_to(cols[None, :], (BM, BN)), mask=kept)
        if not CERTIFIED:
            tl.store(values_out + to, value, mask=kept)
