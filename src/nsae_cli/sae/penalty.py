"""Sparsity penalties S(f) = Σ_i φ(f_i, ν_i) of acts f [B, F] and decoder norms ν_i = ‖W_dec,i‖ [F].

They see the scaled units of training (x' = s·x), where the product f_i·ν_i of a feature is its contribution to x̂'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

#: c of the tanh penalty: a contribution of 1/c in scaled units is where the penalty starts to saturate.
TANH_SLOPE = 4.0

Slopes = tuple[torch.Tensor | float, torch.Tensor | float]


@dataclass(frozen=True)
class L1:
    """φ = f."""

    name: ClassVar[str] = "l1"
    uses_decoder_norms: ClassVar[bool] = False
    jump: ClassVar[float] = 0.0

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        return acts

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        return acts.sum(dim=1)

    def slopes(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> Slopes:
        return 1.0, 0.0


@dataclass(frozen=True)
class L1DecoderNorm:
    """φ = f·ν: L1 that cannot be gamed by small acts and long decoder rows (Anthropic, April 2024)."""

    name: ClassVar[str] = "l1-decoder-norm"
    uses_decoder_norms: ClassVar[bool] = True
    jump: ClassVar[float] = 0.0

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        assert decoder_norms is not None
        return acts * decoder_norms

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        assert decoder_norms is not None
        return acts @ decoder_norms

    def slopes(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> Slopes:
        assert decoder_norms is not None
        return decoder_norms, acts


@dataclass(frozen=True)
class TanhPenalty:
    """φ = tanh(c·f·ν), c = 4: about a count of the features that contribute (Anthropic, January 2025)."""

    name: ClassVar[str] = "tanh"
    uses_decoder_norms: ClassVar[bool] = True
    jump: ClassVar[float] = 0.0

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        assert decoder_norms is not None
        return torch.tanh(TANH_SLOPE * acts * decoder_norms)

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        return self.value(acts, decoder_norms).sum(dim=1)

    def slopes(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> Slopes:
        assert decoder_norms is not None
        slope = TANH_SLOPE * (1 - self.value(acts, decoder_norms).square())
        return slope * decoder_norms, slope * acts


@dataclass(frozen=True)
class L0:
    """φ = 1 where f > 0: the number of active features (Rajamanoharan et al., 2407.14435, section 3).

    Its derivative is 0 almost everywhere; it acts on the thresholds of jumprelu alone, through `jump`.
    """

    name: ClassVar[str] = "l0"
    uses_decoder_norms: ClassVar[bool] = False
    jump: ClassVar[float] = 1.0

    def value(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        return (acts > 0).to(acts.dtype)

    def row_sums(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> torch.Tensor:
        return (acts > 0).sum(dim=1).to(acts.dtype)

    def slopes(self, acts: torch.Tensor, decoder_norms: torch.Tensor | None) -> Slopes:
        return 0.0, 0.0


SparsityPenalty = L1 | L1DecoderNorm | TanhPenalty | L0
PENALTIES: dict[str, SparsityPenalty] = {
    "l1": L1(),
    "l1-decoder-norm": L1DecoderNorm(),
    "tanh": TanhPenalty(),
    "l0": L0(),
}
