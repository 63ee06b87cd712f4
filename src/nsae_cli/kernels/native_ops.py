"""The sparse step's operations on the compiled loops: float32, CPU, all of torch's threads.

Rows and features are cut into ranges that depend on the shapes only and every sum is taken within a range, so the
results do not depend on the number of threads (the float32 encoder's product is torch's own).
"""

from __future__ import annotations

from functools import partial

import torch

from nsae_cli.kernels import scratch
from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.certified import RELATIVE, RoundedRows, bias_of_test, round_rows
from nsae_cli.kernels.entries import Columns, Entries
from nsae_cli.kernels.native.library import NativeLibrary
from nsae_cli.kernels.shadow import FollowedEncoder, feature_major
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.workers import in_parallel, ranges, split

#: Bytes of one block of pre-activations: a block is scanned while the processor's caches still hold part of it.
_BLOCK_BYTES = 48 * 2**20
_MIN_BLOCK_ROWS = 512
#: Tasks per thread: several, since rows differ much in the number of their entries.
_TASKS = 8
#: Columns of x that are packed together, a multiple of 4·VL for every instruction set: with 64 of them [B, 64] floats
#: of x and of the error stay in a core's second-level cache while all features gather from them.
_CHUNK = 64
#: Where x and the error together fit the last-level cache, or features have few entries, gathering whole rows pays
#: more: all columns are one chunk. (At d_in 768 the update of 1,024 rows then takes .65 of the time, of 4,096 rows with
#: 43 entries a feature 1.3 times as long, with 11 entries as long.)
_CACHE_BYTES = 12 * 2**20
_FEW_ENTRIES = 12
_DECODERS = {"free": 0, "unit": 1, "bounded": 2}


class EncoderShadow(FollowedEncoder):
    """Made by the compiled loops."""

    def __init__(self, library: NativeLibrary) -> None:
        super().__init__()
        self._library = library

    def _fill(self, encoder: torch.Tensor) -> None:
        F, d = encoder.shape

        def part(first: int, last: int) -> None:
            self._library.call("shadow", first, last, d, encoder, self.copy, self.norm, self.rest)

        in_parallel(part, split(F, torch.get_num_threads()))


class NativeOps:
    """See `entries.SparseOps`; `update` beside it.

    Args:
        library: the compiled loops.
        certified: encode in bfloat16 with the bound of `certified`, else in float32.
        chunk: columns that the gradients are gathered in at a time, a multiple of 64; None chooses by size.
    """

    def __init__(self, library: NativeLibrary, certified: bool, chunk: int | None = None) -> None:
        self._library = library
        self._chunk = chunk
        self._shadow = EncoderShadow(library) if certified else None
        self.name = f"native {library.isa}{', certified bf16 encoder' if certified else ', fp32 encoder'}"
        #: Entries that were evaluated anew in float32 since the start (certified only).
        self.evaluated = 0

    def active(
        self,
        x: torch.Tensor,
        weights: Weights,
        b_enc: torch.Tensor,
        *,
        noise: torch.Tensor | None,
        threshold: float,
        top_k: int | None,
    ) -> Entries:
        """See `SparseOps.active`."""
        for tensor in (x, noise):
            if tensor is not None:
                assert tensor.is_contiguous(), "the compiled loops read whole rows"
                assert tensor.dtype == torch.float32, "the compiled loops read float32"
        B, F = x.shape[0], b_enc.shape[0]
        encoder = feature_major(weights.W_enc)
        rounded: RoundedRows | None = None
        test_bias = b_enc
        if self._shadow is not None:
            self._shadow.refresh(weights.W_enc)
            rounded = round_rows(x, weights.b_dec)
            test_bias = bias_of_test(encoder, b_enc, weights.b_dec)
        collect = _Collect(self._library, self._shadow, rounded, x, encoder, b_enc, test_bias, noise, threshold, top_k)
        element = 4 if rounded is None else 2
        block_rows = max(_MIN_BLOCK_ROWS, _BLOCK_BYTES // (F * element))
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for first, last in ranges(B, block_rows):
            z = scratch.buffer("z", last - first, F, torch.float32 if rounded is None else torch.bfloat16)
            if rounded is None or self._shadow is None:
                torch.mm(x[first:last], encoder.t(), out=z)
            else:
                torch.mm(rounded.rows[first:last], self._shadow.copy.t(), out=z)
            found = in_parallel(partial(collect.rows, z, first), _row_tasks(last - first))
            pieces += [piece for parts, _ in found for piece in parts]
            self.evaluated += sum(candidates for _, candidates in found)
        row_ptr = torch.zeros(B + 1, dtype=torch.int64)
        if not pieces:
            return Entries(row_ptr, torch.empty(0, dtype=torch.int32), x.new_empty(0))
        torch.cumsum(torch.cat([piece[0] for piece in pieces]), 0, out=row_ptr[1:])
        return Entries(row_ptr, torch.cat([piece[1] for piece in pieces]), torch.cat([piece[2] for piece in pieces]))

    def decode(
        self, entries: Entries, acts: torch.Tensor, weights: Weights, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `SparseOps.decode`."""
        B, d = x.shape
        error, sq_error, dots = torch.empty_like(x), x.new_empty(B), torch.empty_like(acts)

        def part(first: int, last: int) -> None:
            self._library.call(
                "decode",
                *(first, last, d),
                *(entries.row_ptr, entries.cols, acts, weights.W_dec, weights.b_dec, x),
                *(error, sq_error, dots),
            )

        in_parallel(part, _row_tasks(B))
        return error, sq_error, dots

    def row_sums(self, entries: Entries, values: torch.Tensor) -> torch.Tensor:
        """See `SparseOps.row_sums`; added up in float64."""
        B = len(entries.row_ptr) - 1
        sums = torch.empty(B)
        self._library.call("row_sums", B, entries.row_ptr, values, sums)
        return sums

    def by_feature(
        self, entries: Entries, d_sae: int, delta: torch.Tensor, pull: torch.Tensor, dots: torch.Tensor
    ) -> Columns:
        """See `SparseOps.by_feature`; a counting sort."""
        E = len(entries.cols)
        columns = Columns(
            col_ptr=torch.empty(d_sae + 1, dtype=torch.int64),
            rows=torch.empty(E, dtype=torch.int32),
            delta=torch.empty(E),
            pull=torch.empty(E),
            sum_delta=torch.empty(d_sae, dtype=torch.float64),
            sum_along=torch.empty(d_sae, dtype=torch.float64),
        )
        self._library.call(
            "by_feature",
            *(len(entries.row_ptr) - 1, d_sae, entries.row_ptr, entries.cols, delta, pull, dots),
            *(columns.col_ptr, columns.rows, columns.delta, columns.pull, columns.sum_delta, columns.sum_along),
        )
        return columns

    def gradients(
        self,
        columns: Columns,
        x: torch.Tensor,
        error: torch.Tensor,
        along: torch.Tensor,
        weights: Weights,
        gradients: Weights,
    ) -> None:
        """See `SparseOps.gradients`."""
        B, d = x.shape
        chunk = self._chunk or _chunk(columns, x)
        x_packed, error_packed = self._packed("x", x, chunk), self._packed("error", error, chunk)
        grad_enc = feature_major(gradients.W_enc)

        def part(first: int, last: int) -> None:
            self._library.call(
                "gradients",
                *(first, last, B, d, chunk, columns.col_ptr, columns.rows, columns.delta, columns.pull),
                *(x_packed, error_packed, along, weights.W_dec, grad_enc, gradients.W_dec),
            )

        in_parallel(part, split(len(along), torch.get_num_threads()))
        # Written behind torch's back.
        for tensor in (gradients.W_enc, gradients.W_dec):
            torch.autograd.graph.increment_version(tensor)

    def update(
        self,
        columns: Columns,
        x: torch.Tensor,
        error: torch.Tensor,
        along: torch.Tensor,
        weights: Weights,
        adam: Adam,
        decoder: str,
        lr: float,
    ) -> None:
        """The gradients of `gradients`, Adam's step on W_enc and W_dec, and the decoder's constraint, in one pass.

        Args:
            adam: holds the moments; `adam.step_biases` has counted this step already.
            decoder: ``free``, ``unit`` or ``bounded``.
            lr: learning rate.
        """
        B, d = x.shape
        chunk = self._chunk or _chunk(columns, x)
        x_packed, error_packed = self._packed("x", x, chunk), self._packed("error", error, chunk)
        encoder = feature_major(weights.W_enc)
        first_moment, second_moment = adam.moments()
        moments = (
            feature_major(first_moment.W_enc),
            feature_major(second_moment.W_enc),
            first_moment.W_dec,
            second_moment.W_dec,
        )
        shadow = self._shadow
        copies = (None, None, None) if shadow is None else (shadow.copy, shadow.norm, shadow.rest)
        numbers = adam.numbers(lr)

        def part(first: int, last: int) -> None:
            self._library.call(
                "update",
                *(first, last, B, d, chunk, columns.col_ptr, columns.rows, columns.delta, columns.pull),
                *(x_packed, error_packed, along, _DECODERS[decoder], encoder, weights.W_dec),
                *moments,
                *numbers,
                *copies,
            )

        in_parallel(part, split(len(along), torch.get_num_threads()))
        for tensor in (weights.W_enc, weights.W_dec):
            torch.autograd.graph.increment_version(tensor)
        if shadow is not None:
            shadow.is_of(weights.W_enc)

    def _packed(self, name: str, rows: torch.Tensor, chunk: int) -> torch.Tensor:
        B, d = rows.shape
        if chunk == d:
            return rows  # packed as they are
        chunks = -(-d // chunk)
        packed = scratch.buffer(f"packed {name}", chunks * B, chunk, torch.float32)

        def part(first: int, last: int) -> None:
            self._library.call("pack", first, last, B, d, chunk, rows, packed)

        in_parallel(part, split(B, torch.get_num_threads()))
        return packed


class _Collect:
    """The scan of a batch's pre-activations, block by block."""

    def __init__(
        self,
        library: NativeLibrary,
        shadow: EncoderShadow | None,
        rounded: RoundedRows | None,
        x: torch.Tensor,
        encoder: torch.Tensor,
        b_enc: torch.Tensor,
        test_bias: torch.Tensor,
        noise: torch.Tensor | None,
        threshold: float,
        top_k: int | None,
    ) -> None:
        self._library, self._shadow, self._rounded = library, shadow, rounded
        self._threshold, self._top_k = threshold, top_k or 0
        self._x, self._encoder, self._b_enc, self._test_bias, self._noise = x, encoder, b_enc, test_bias, noise

    def rows(
        self, z: torch.Tensor, block: int, first: int, last: int
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], int]:
        """Entries of rows block + first ≤ i < block + last: pieces of (counts, cols, pre_acts), and how many were
        evaluated anew."""
        F, d = self._encoder.shape
        candidates = torch.zeros(1, dtype=torch.int64)
        pieces = []
        expected = F + 96 * (last - first)
        while first < last:
            count = last - first
            counts = torch.empty(count, dtype=torch.int32)
            cols, values = torch.empty(expected, dtype=torch.int32), torch.empty(expected)
            rows = slice(block + first, block + last)
            bounds: tuple[torch.Tensor | None, ...] = (None,) * 5
            if self._shadow is not None and self._rounded is not None:
                bound = self._rounded
                bounds = (self._shadow.norm, self._shadow.rest, bound.row_a[rows], bound.row_b[rows], bound.slack[rows])
            done = self._library.call(
                "collect",
                *(z[first:], int(self._shadow is not None), count, F, d, self._test_bias),
                None if self._noise is None else self._noise[rows],
                torch.full((count,), self._threshold) if self._threshold > 0 else None,
                *(self._top_k, self._x[rows], self._encoder, self._b_enc, *bounds, RELATIVE),
                *(expected, counts, cols, values),
                *(scratch.buffer("cols", 1, F, torch.int32), scratch.buffer("values", 1, F, torch.float32)),
                candidates,
            )
            counts = counts[:done]
            used = int(counts.sum())
            pieces.append((counts, cols[:used], values[:used]))
            first += done
            expected = max(expected, F * min(last - first, 64))  # dense rows: room for all that they can hold
        return pieces, int(candidates)


def _row_tasks(rows: int) -> list[tuple[int, int]]:
    threads = torch.get_num_threads()
    return split(rows, 1 if threads == 1 else _TASKS * threads)


def _chunk(columns: Columns, x: torch.Tensor) -> int:
    """How many columns are gathered at a time; a multiple of _CHUNK."""
    few = len(columns.rows) < _FEW_ENTRIES * (len(columns.col_ptr) - 1)
    whole = few or 2 * x.numel() * x.element_size() <= _CACHE_BYTES
    return -(-x.shape[1] // _CHUNK) * _CHUNK if whole else _CHUNK
