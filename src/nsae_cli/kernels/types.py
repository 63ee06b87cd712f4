"""What goes into a training step's kernel and what comes out. Shapes: B rows, d = d_in, F = d_sae."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass
class Weights:
    """The four parameters of an SAE, or their gradients.

    Attributes:
        W_enc: [d, F]
        b_enc: [F]
        W_dec: [F, d]
        b_dec: [d]
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        """The four tensors in the order W_enc, b_enc, W_dec, b_dec."""
        yield from (self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def named(self) -> dict[str, torch.Tensor]:
        """The four tensors by name."""
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def zeros_like(self) -> Weights:
        """Four zero tensors of the same shapes, layout, dtype and device."""
        return Weights(*(torch.zeros_like(tensor) for tensor in self.tensors()))

    def to(self, dtype: torch.dtype) -> Weights:
        """A detached copy in `dtype`."""
        return Weights(*(tensor.detach().to(dtype, copy=True) for tensor in self.tensors()))

    def by_feature(self) -> Weights:
        """The same values with W_enc laid out feature by feature in memory, as the sparse kernels read it."""
        return Weights(self.W_enc.t().contiguous().t(), self.b_enc, self.W_dec, self.b_dec)


@dataclass(frozen=True)
class Selection:
    """Which entries may be active.

    Attributes:
        top_k: None: all that are positive; else the `top_k` largest of those, of each row or on average over a batch.
        over: ``row``, or ``batch``: the top_k·B largest of the whole batch.
    """

    top_k: int | None = None
    over: Literal["row", "batch"] = "row"


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

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        """φ(f_i, ν_i), element-wise [B, F], differentiable."""

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        """S of each row [B]: the sum of `value` over the features."""

    def slopes(
        self, acts: torch.Tensor, decoder_norms: torch.Tensor | None
    ) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """∂φ/∂f and ∂φ/∂ν at (acts, decoder_norms), each a number or broadcastable to [B, F]."""


@dataclass
class StepResult:
    """What a kernel returns beside the gradients.

    Attributes:
        error: x̂ − x [B, d] (float32 or wider)
        sq_error: ‖x̂ − x‖² per row [B]
        penalty: S per row [B]
        l0: number of positive acts per row [B], float
        l1: Σ_i f_i per row [B]
        fired: whether each feature was positive in any row [F], bool
    """

    error: torch.Tensor
    sq_error: torch.Tensor
    penalty: torch.Tensor
    l0: torch.Tensor
    l1: torch.Tensor
    fired: torch.Tensor
