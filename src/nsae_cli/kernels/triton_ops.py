"""The sparse step's operations in Triton: float32, CUDA; on the CPU in Triton's interpreter, for tests.

Transfers to the host: one per step, of two numbers, in `active` (how many candidates and entries there are), since
entries are tensors of exactly that many. Everything else is queued without waiting. Where more candidates are found
than there is room for, the same transfer says how many: `active` takes more room and encodes anew, or, beyond
`most_density`, raises `TooManyEntriesError` and leaves the step to the caller, who has a dense one.

Every result has the same bits each time, also without `deterministic`: of the kernels only `find_reserved` has atomics,
and these decide where entries are staged, not where they end.

Not here, a CUDA graph: it needs entries in tensors of fixed capacity with their number on the device. What is missing
for that: `Entries` and `Columns` with a capacity and a device-side number; `SparseStep` without the three places that
use E on the host (`repeat_interleave(output_size=…)` twice, the slices that `active` returns) and with masks in the
activation's and the penalty's element-wise passes; kernels that take E from the device (all but the sort in
`by_feature` do already, through row_ptr and col_ptr); a sort of the whole capacity with the unused part at the end; the
number of slots of frequent features fixed instead of derived from E; Adam's numbers in device memory, since
arguments of a captured launch are frozen; and the overflow read after the graph, before the update's part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.certified import RELATIVE, round_rows
from nsae_cli.kernels.entries import Columns, Entries, TooManyEntriesError
from nsae_cli.kernels.shadow import FollowedEncoder, feature_major
from nsae_cli.kernels.triton_kernels import features, find
from nsae_cli.kernels.triton_kernels import rows as rowwise
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.workers import ranges

#: A feature that is active in a larger share of the rows goes through a dense product. An estimate, not a measurement:
#: in float32 a gather of 2·4·d bytes at 6.5 TB/s takes as long as the product's 4·d FLOP per row at 50 TFLOP/s from
#: 6.5 % on; below twice that, the slots that stay empty cost more than is won.
DENSE_SHARE = 0.125
#: Rows of a block in the product of top-k steps are chosen so that it takes at most this many bytes.
_TOP_K_BYTES = 2**28
#: Room for candidates at first, per row; it grows to what is needed and a quarter.
_ROOM_PER_ROW = 128
_GROWTH = 1.25
#: Elements of a block [entries, d] in registers: 64 to each of 128 threads.
_BLOCK_ELEMENTS = 8192
_BLOCK = 128
#: Products in bfloat16, and in float32, which has no tensor cores: (rows, features, depth, warps, stages) of a tile.
_TILE_BF16 = (128, 128, 64, 8, 3)
_TILE_FP32 = (64, 64, 32, 4, 2)
#: Norms are float32 sums of d squares: relative error below this for d up to 2¹³, in any order.
_ROUND_UP = 1 + 2.0**-10
#: What the test's own float32 arithmetic may be off by, relative to its terms.
_OF_TEST = RELATIVE - 2.0**-8
#: Of every launch: multiply and add in one instruction, as Triton has done so far; its default is about to change.
_FUSED = {"enable_fp_fusion": True}
_CONSTRAINTS = {"free": 0, "unit": 1, "bounded": 2}


class _Shadow(FollowedEncoder):
    """Made on the device."""

    def _fill(self, encoder: torch.Tensor) -> None:
        F, d = encoder.shape
        features.shadow[(F,)](encoder, *self.parts(d), BD=_width(d), num_warps=_warps(d), **_FUSED)

    def parts(self, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float, float]:
        """What a kernel takes that writes the copy."""
        # Squares of numbers below 2⁻⁶³ vanish in float32; √d times that covers them.
        return self.copy.view(torch.int16), self.norm, self.rest, d, _ROUND_UP, d**0.5 * 2.0**-62


@dataclass(frozen=True)
class _Search:
    """What the search for entries multiplies and compares; `certified.py` for the parts of the bound."""

    x: torch.Tensor
    encoder: torch.Tensor
    bias: torch.Tensor
    noise: torch.Tensor | None
    bounds: tuple[torch.Tensor | None, ...]
    threshold: float

    @property
    def certified(self) -> bool:
        return self.bounds[0] is not None


class TritonOps:
    """See `entries.SparseOps`; `update` beside it.

    Args:
        certified: encode in bfloat16 with the bound of `certified`, else in float32 (no TF32). Top-k steps encode in
            float32 in either case.
        deterministic: find entries without atomics, at the price of a second product.
        most_density: share of the B·F pre-activations beyond which `active` raises TooManyEntriesError.
        dense_share: see `DENSE_SHARE`; 1 or more for none.
    """

    def __init__(
        self,
        certified: bool,
        deterministic: bool = False,
        *,
        most_density: float = 1.0,
        dense_share: float = DENSE_SHARE,
    ) -> None:
        self._shadow = _Shadow() if certified else None
        self._deterministic = deterministic
        self._most_density, self._dense_share = most_density, dense_share
        self._room = 0
        self.name = f"triton{', certified bf16 encoder' if certified else ', fp32 encoder'}"
        #: Entries that were evaluated in float32 in the last step (certified only).
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
        """See `SparseOps.active`.

        Raises:
            TooManyEntriesError: more than `most_density` allows.
        """
        B, F = len(x), len(b_enc)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert noise is None or noise.is_contiguous()
        if top_k is not None and top_k < F:
            return _largest(x, weights, b_enc, noise, threshold, top_k)
        encoder = feature_major(weights.W_enc)
        search = _Search(x, encoder, b_enc, noise, (None,) * 5, threshold)
        if self._shadow is not None:
            self._shadow.refresh(weights.W_enc)
            rounded = round_rows(x, weights.b_dec)
            search = _Search(
                rounded.rows,
                self._shadow.copy,
                torch.addmv(b_enc, encoder, weights.b_dec),
                noise,
                (rounded.row_a, rounded.row_b, rounded.slack, self._shadow.norm, self._shadow.rest),
                threshold,
            )
        # Places are 32-bit numbers in the kernels, which have no registers for more.
        most = min(int(self._most_density * B * F), 2**31 - 1)
        while True:
            room = min(most, max(self._room, _ROOM_PER_ROW * B))
            row_ptr, cols, values = self._find(search, room)
            found = row_ptr[-1]
            if search.certified:
                row_ptr, cols, values = self._evaluate(row_ptr, cols, x, encoder, b_enc, noise, threshold)
            needed, entries = torch.stack((found, row_ptr[-1])).tolist()  # the step's one transfer to the host
            if needed <= room:
                self.evaluated = needed if search.certified else 0
                return Entries(row_ptr, cols[:entries], values[:entries])
            if needed > most:
                raise TooManyEntriesError(needed, most)
            self._room = int(_GROWTH * needed)

    def _find(self, search: _Search, room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """row_ptr, complete in any case, cols and values of the entries (certified: the candidates) as far as there is
        room; values of certified ones are not written."""
        B, d = search.x.shape
        F = len(search.encoder)
        BM, BN, BK, warps, stages = _TILE_BF16 if search.certified else _TILE_FP32
        down, across = triton.cdiv(B, BM), triton.cdiv(F, BN)
        device = search.x.device
        counts = torch.empty(B, across, dtype=torch.int32, device=device)
        # Zeros: where there is not enough room, places of dropped candidates are evaluated all the same.
        cols = torch.zeros(room, dtype=torch.int32, device=device)
        values = torch.empty(room, device=device)
        inputs = (search.x, search.encoder, search.bias, search.noise, *search.bounds, search.threshold, _OF_TEST)
        sizes = (B, F, d, down, across)
        options = {"BM": BM, "BN": BN, "BK": BK, "CERTIFIED": search.certified, "WIDEN": device.type == "cpu"}
        launch = {"num_warps": warps, "num_stages": stages, **_FUSED}
        if self._deterministic:
            # The same arguments to both passes, up to `write`: other types would be another compiled kernel.
            tile_ptr = torch.zeros(B * across + 1, dtype=torch.int64, device=device)
            kernel = find.find_in_two_passes[(down * across,)]
            arguments = (*inputs, *sizes, counts, tile_ptr, room, cols, values)
            kernel(*arguments, 0, **options, **launch)
            torch.cumsum(counts.flatten(), 0, out=tile_ptr[1:])
            kernel(*arguments, 1, **options, **launch)
            return tile_ptr[::across].contiguous(), cols, values
        taken = torch.zeros(1, dtype=torch.int32, device=device)
        staged = (*(_integers(room, device) for _ in range(2)), torch.empty(room, device=device))
        find.find_reserved[(down * across,)](*inputs, *sizes, counts, taken, room, *staged, **options, **launch)
        tile_ptr = _running_sum(counts)
        find.place[(triton.cdiv(room, 1024),)](
            *(tile_ptr, *staged, cols, values, taken, room, across),
            BN=BN,
            HAS_VALUES=not search.certified,
            BLOCK=1024,
            **_FUSED,
        )
        return tile_ptr[::across].contiguous(), cols, values

    def _evaluate(
        self,
        found_ptr: torch.Tensor,
        candidates: torch.Tensor,
        x: torch.Tensor,
        encoder: torch.Tensor,
        b_enc: torch.Tensor,
        noise: torch.Tensor | None,
        threshold: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """row_ptr, cols and values of the candidates that exceed the threshold in float32."""
        (B, d), F, room = x.shape, len(b_enc), len(candidates)
        counts = _integers(B, x.device)
        kept_cols, kept_values = torch.empty_like(candidates), x.new_empty(room)
        rowwise.evaluate[(B,)](
            *(x, encoder, b_enc, noise, threshold, found_ptr, candidates, room, counts, kept_cols, kept_values, F, d),
            **_blocks(d),
        )
        row_ptr, cols, values = _running_sum(counts), torch.empty_like(candidates), x.new_empty(room)
        rowwise.close_gaps[(B,)](found_ptr, row_ptr, kept_cols, kept_values, room, cols, values, BLOCK=_BLOCK, **_FUSED)
        return row_ptr, cols, values

    def decode(
        self, entries: Entries, acts: torch.Tensor, weights: Weights, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `SparseOps.decode`."""
        B, d = x.shape
        error, sq_error, dots = torch.empty_like(x), x.new_empty(B), torch.empty_like(acts)
        rowwise.decode[(B,)](
            *(entries.row_ptr, entries.cols, acts, weights.W_dec, weights.b_dec, x, error, sq_error, dots, d),
            **_blocks(d),
        )
        return error, sq_error, dots

    def row_sums(self, entries: Entries, values: torch.Tensor) -> torch.Tensor:
        """See `SparseOps.row_sums`; added up in float64."""
        B = len(entries.row_ptr) - 1
        sums = values.new_empty(B)
        rowwise.row_sums[(B,)](entries.row_ptr, values, sums, BLOCK=_BLOCK, **_FUSED)
        return sums

    def by_feature(
        self, entries: Entries, d_sae: int, delta: torch.Tensor, pull: torch.Tensor, dots: torch.Tensor
    ) -> Columns:
        """See `SparseOps.by_feature`; a stable sort of the columns, and a binary search for where each begins."""
        E, device = len(entries.cols), entries.cols.device
        in_order, order = torch.sort(entries.cols, stable=True)
        bounds = torch.arange(d_sae + 1, dtype=torch.int32, device=device)
        columns = Columns(
            col_ptr=torch.searchsorted(in_order, bounds),
            rows=_integers(E, device),
            delta=torch.empty_like(delta),
            pull=torch.empty_like(pull),
            sum_delta=torch.empty(d_sae, dtype=torch.float64, device=device),
            sum_along=torch.empty(d_sae, dtype=torch.float64, device=device),
        )
        features.columns[(d_sae,)](
            *(columns.col_ptr, order, entries.rows().int(), delta, pull, dots),
            *(columns.rows, columns.delta, columns.pull, columns.sum_delta, columns.sum_along),
            BLOCK=_BLOCK,
            **_FUSED,
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
        d = x.shape[1]
        features.gradients[(len(along),)](
            *(columns.col_ptr, columns.rows, columns.delta, columns.pull, x, error),
            *self._frequent(columns, x, error),
            *(along, weights.W_dec, feature_major(gradients.W_enc), gradients.W_dec, d),
            **_blocks(d),
        )
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
        """See `entries.UpdatingOps.update`."""
        d = x.shape[1]
        first, second = adam.moments()
        copies = (None, None, None, d, 0.0, 0.0) if self._shadow is None else self._shadow.parts(d)
        copy, norm, rest, _, round_up, smallest = copies
        features.update[(len(along),)](
            *(columns.col_ptr, columns.rows, columns.delta, columns.pull, x, error),
            *self._frequent(columns, x, error),
            *(along, feature_major(weights.W_enc), weights.W_dec),
            *(feature_major(first.W_enc), feature_major(second.W_enc), first.W_dec, second.W_dec),
            *adam.numbers(lr),
            *(copy, norm, rest, round_up, smallest, d),
            CONSTRAINT=_CONSTRAINTS[decoder],
            **_blocks(d),
        )
        for tensor in (weights.W_enc, weights.W_dec):
            torch.autograd.graph.increment_version(tensor)
        if self._shadow is not None:
            self._shadow.is_of(weights.W_enc)

    def _frequent(
        self, columns: Columns, x: torch.Tensor, error: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Sums of frequent features by dense products: the slot of each feature (−1: none), Δᵀx and Pᵀ·error [H, d].

        H is the most that there can be: the E entries are shared by fewer than E/c features that have more than c each.
        So it is known without asking the device. (None, None, None) where it is 0.
        """
        B, F = len(x), len(columns.sum_delta)
        least = int(self._dense_share * B)
        slots = min(F, len(columns.rows) // (least + 1))
        if self._dense_share >= 1 or not slots:
            return None, None, None
        is_frequent = columns.counts > least
        number = torch.cumsum(is_frequent, 0)
        slot_of = torch.where(is_frequent, number - 1, -1).int()
        frequent = torch.searchsorted(number, torch.arange(1, slots + 1, device=x.device))
        delta, pull = x.new_zeros(slots, B), x.new_zeros(slots, B)
        features.dense_slice[(slots,)](
            *(frequent, columns.col_ptr, columns.rows, columns.delta, columns.pull, delta, pull, B, F),
            BLOCK=_BLOCK,
            **_FUSED,
        )
        return slot_of, delta @ x, pull @ error


def _largest(
    x: torch.Tensor, weights: Weights, b_enc: torch.Tensor, noise: torch.Tensor | None, threshold: float, top_k: int
) -> Entries:
    """The `top_k` largest of each row that exceed the threshold.

    By `torch.topk` on the float32 product: of a top-k SAE's pre-activations half may be positive, so that compaction
    above 0 would hold them all, and a guess of each row's threshold would have to be checked by the host. Of equal
    values at the border `torch.topk` chooses.
    """
    B, F = x.shape[0], len(b_enc)
    best, cols = x.new_empty(B, top_k), torch.empty(B, top_k, dtype=torch.int64, device=x.device)
    for first, last in ranges(B, max(1, _TOP_K_BYTES // (4 * F))):
        z = torch.addmm(b_enc, x[first:last], weights.W_enc)
        if noise is not None:
            z += noise[first:last]
        torch.topk(z, top_k, dim=1, sorted=False, out=(best[first:last], cols[first:last]))
    cols, order = torch.sort(cols, dim=1)
    best = best.gather(1, order)
    wanted = ~(best <= threshold)
    kept = wanted.flatten().nonzero()[:, 0]  # the step's one transfer to the host
    return Entries(_running_sum(wanted.sum(1)), cols.flatten()[kept].int(), best.flatten()[kept])


def _running_sum(counts: torch.Tensor) -> torch.Tensor:
    """0, and the running sum of all counts, int64 [n + 1]."""
    sums = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=sums[1:])
    return sums


def _integers(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int32, device=device)


def _width(d: int) -> int:
    return int(triton.next_power_of_2(d))


def _warps(d: int) -> int:
    return 4 if d <= 2048 else 8


def _blocks(d: int) -> dict[str, Any]:
    """Launch options of a kernel that holds blocks [entries, d]."""
    width = _width(d)
    return {"BD": width, "BE": max(1, min(16, _BLOCK_ELEMENTS // width)), "num_warps": _warps(d), **_FUSED}
