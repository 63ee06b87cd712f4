"""What goes into a training step's kernel and what comes out. Shapes: B rows, d = d_in, F = d_sae."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a contiguous tensor: a matrix that is laid out by columns comes transposed."""
    return tensor if tensor.is_contiguous() else tensor.t()


@dataclass
class Weights:
    """The parameters of an SAE, or their gradients.

    Attributes:
        W_enc: [d, F]
        b_enc: [F]
        W_dec: [F, d]
        b_dec: [d]
        log_threshold: log θ_j of an activation that is 0 up to θ_j, [F]; None where the activation has no thresholds.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    log_threshold: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that there are, in the order W_enc, b_enc, W_dec, b_dec, log_threshold."""
        yield from self.named().values()

    def named(self) -> dict[str, torch.Tensor]:
        """The same by name."""
        tensors = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return tensors if self.log_threshold is None else tensors | {"log_threshold": self.log_threshold}

    def zeros_like(self) -> Weights:
        """Zero tensors of the same shapes, layout, dtype and device."""
        return Weights(*(torch.zeros_like(tensor) for tensor in self.tensors()))

    def to(self, dtype: torch.dtype) -> Weights:
        """A detached copy in `dtype`."""
        return Weights(*(tensor.detach().to(dtype, copy=True) for tensor in self.tensors()))

    def features(self, part: slice) -> Weights:
        """Views of those of some features."""
        log_threshold = None if self.log_threshold is None else self.log_threshold[part]
        return Weights(self.W_enc[:, part], self.b_enc[part], self.W_dec[part], self.b_dec, log_threshold)

    def by_feature(self) -> Weights:
        """The same values with W_enc laid out feature by feature in memory, as the sparse kernels read it."""
        return Weights(self.W_enc.t().contiguous().t(), self.b_enc, self.W_dec, self.b_dec, self.log_threshold)


@dataclass(frozen=True)
class Selection:
    """Which entries may be active.

    Attributes:
        top_k: None: all that are positive; else the `top_k` largest of those, of each row or on average over a batch.
        over: ``row``, or ``batch``: the top_k·B largest of the whole batch. Among equal ones those of the lower row,
            then of the lower column, are taken.
        bandwidth: None, or ε: only those above the thresholds θ_j = exp(log_threshold_j) of the weights, which learn
            from pre-activations within ε/2 of them (`jump`); 0 for thresholds that are fixed.
    """

    top_k: int | None = None
    over: Literal["row", "batch"] = "row"
    bandwidth: float | None = None


POSITIVE = Selection()


class Activation(Protocol):
    """An activation that is 0 wherever its input is not positive: a selection of entries, then a function of each."""

    @property
    def name(self) -> str: ...

    @property
    def selection(self) -> Selection: ...

    def value(self, pre_acts: torch.Tensor) -> torch.Tensor:
        """acts = act(pre_acts), differentiable."""

    def value_(self, pre_acts: torch.Tensor) -> torch.Tensor:
        """The same in place."""

    def scale_by_derivative_(self, gradient: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        """gradient *= act'(pre_acts), from acts alone."""


class Penalty(Protocol):
    """A sparsity penalty S = Σ_i φ(f_i, ν_i) of acts f and decoder norms ν."""

    @property
    def name(self) -> str: ...

    @property
    def uses_decoder_norms(self) -> bool: ...

    @property
    def jump(self) -> float:
        """φ just above f = 0, where φ(0) = 0: 1 for a count, 0 for a penalty that grows from 0."""

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        """φ(f_i, ν_i), element-wise [B, F], differentiable."""

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        """S of each row [B]: the sum of `value` over the features."""

    def slopes(
        self, acts: torch.Tensor, decoder_norms: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """∂φ/∂f and ∂φ/∂ν at (acts, decoder_norms), each a number or broadcastable to [B, F]."""


class Measured(NamedTuple):
    """A batch's distances and their gradient, ∂D/∂x̂ = factor·slope.

    Attributes:
        value: D [B]
        slope: [B, d]
        factor: one for all rows, or [B]
    """

    value: torch.Tensor
    slope: torch.Tensor
    factor: torch.Tensor | float


class Distance(Protocol):
    """The error D of a row, which the loss weighs with the error weight."""

    @property
    def name(self) -> str: ...

    @property
    def degree(self) -> int:
        """Its power of s where x and x̂ are both multiplied with s."""

    def value(self, x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
        """D [B] of x and x̂ [B, d], differentiable in x̂."""

    def measure_(self, x: torch.Tensor, x_hat: torch.Tensor) -> Measured:
        """D and its gradient; turns x̂ into x̂ − x in place."""


class BatchChoice(Protocol):
    """Finds the largest positive entries of a batch that comes in blocks of rows, in two passes."""

    def offer(self, z: torch.Tensor) -> None:
        """First pass: looks at a block [rows, F]."""

    def choose(self, z: torch.Tensor) -> torch.Tensor:
        """Second pass: where the largest are in a block, bool [rows, F]; blocks in the order of their rows."""


class Exchange(Protocol):
    """What a step tells the other processes where a batch's rows or an SAE's features are spread over several.

    Each process has some rows and some features of them, F of all; processes with the same rows come in the order of
    their features, and all have equally many.
    """

    @property
    def whole_rows(self) -> bool:
        """Whether this process has all features of its rows."""

    def add_features_(self, part: torch.Tensor) -> None:
        """Adds up the parts of the processes that have the same rows, in place."""

    def any_feature(self, here: bool) -> bool:
        """Whether it is so in any process that has the same rows."""

    def row_top_k(self, z: torch.Tensor, k: int) -> torch.Tensor:
        """`selection.row_top_k` over all features of each row: which of those here, bool [rows, F]."""

    def batch_top_k(self, k: int, rows: int) -> BatchChoice:
        """`selection.BatchTopK` of the k·B largest over all B rows and all features; rows: of them here."""

    def complete_(self, result: StepResult) -> None:
        """Makes sums over features of them, and a least act over the batch, of those of this process."""


@dataclass
class RowGradients:
    """Sums from which the norm of each row's own part of ∂L/∂W_enc and ∂L/∂W_dec follows, without those parts.

    With δ = ∂L/∂pre_acts and g = ∂L/∂x̂ of a row, a_j = sparsity_weight·∂φ/∂ν_j: its part of ∂W_enc is x ⊗ δ, row j of
    its part of ∂W_dec is f_j·g + a_j·d_j/‖d_j‖ (before the projection of a unit decoder).

    Attributes:
        delta_sq: Σ_j δ_j² [B]
        acts_sq: Σ_j f_j² [B]
        pull_sq: ‖g‖² [B]
        along_sq: Σ_j f_j²·(g·d_j)² [B]
        norm_sq: Σ_j a_j² [B]; None for penalties without decoder norms
        norm_cross: Σ_j f_j·a_j·(g·d_j)/‖d_j‖ [B]; None likewise
    """

    delta_sq: torch.Tensor
    acts_sq: torch.Tensor
    pull_sq: torch.Tensor
    along_sq: torch.Tensor
    norm_sq: torch.Tensor | None = None
    norm_cross: torch.Tensor | None = None

    @staticmethod
    def cat(parts: list[RowGradients], nothing: torch.Tensor) -> RowGradients:
        """Those of rows one after the other; `nothing` [0] stands for each sum where there are no rows."""
        of_rows = parts or [RowGradients(nothing, nothing, nothing, nothing)]

        def join(values: list[torch.Tensor | None]) -> torch.Tensor | None:
            found = [value for value in values if value is not None]
            return torch.cat(found) if found else None

        return RowGradients(
            torch.cat([part.delta_sq for part in of_rows]),
            torch.cat([part.acts_sq for part in of_rows]),
            torch.cat([part.pull_sq for part in of_rows]),
            torch.cat([part.along_sq for part in of_rows]),
            join([part.norm_sq for part in of_rows]),
            join([part.norm_cross for part in of_rows]),
        )


@dataclass
class StepResult:
    """What a kernel returns beside the gradients.

    Attributes:
        error: x̂ − x [B, d] (float32 or wider)
        sq_error: ‖x̂ − x‖² per row [B]
        distance: D per row [B]: what the loss weighs; ‖x̂ − x‖² unless it has another distance
        penalty: S per row [B]
        l0: number of positive acts per row [B], float
        l1: Σ_i f_i per row [B]
        fired: whether each feature was positive in any row [F], bool
        least_act: the smallest positive act of the batch (∞ if there is none), a scalar; None unless the activation
            selects over the batch.
        row_gradients: sums for the gradient norms of rows; None unless they were asked for.
    """

    error: torch.Tensor
    sq_error: torch.Tensor
    distance: torch.Tensor
    penalty: torch.Tensor
    l0: torch.Tensor
    l1: torch.Tensor
    fired: torch.Tensor
    least_act: torch.Tensor | None = None
    row_gradients: RowGradients | None = None
