"""The encoder in bfloat16 with each feature's parts of the certified bound, kept from step to step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


def feature_major(W_enc: torch.Tensor) -> torch.Tensor:
    """[d, F] with the features outermost in memory → [F, d] contiguous, no copy."""
    by_feature = W_enc.t()
    assert by_feature.is_contiguous(), "W_enc has to be laid out by feature: Weights.by_feature()"
    return by_feature


class FollowedEncoder(ABC):
    """A bfloat16 copy of W_enc; made anew when the weights have changed.

    Attributes:
        copy: bfloat16 [F, d]
        norm, rest: ‖W_enc,j‖ and ‖W_enc,j − copy_j‖, rounded up, float32 [F]
    """

    def __init__(self) -> None:
        self._of: tuple[torch.Tensor, int] | None = None
        self.copy = torch.empty(0, dtype=torch.bfloat16)
        self.norm = self.rest = torch.empty(0)

    def is_of(self, W_enc: torch.Tensor) -> None:
        """Says that the copy is that of W_enc as it is now."""
        self._of = (W_enc, W_enc._version)  # every change in place counts the version up

    def refresh(self, W_enc: torch.Tensor) -> None:
        """Follows W_enc [d, F], unless it is the one that is followed already and has not changed."""
        if self._of is not None and self._of[0] is W_enc and self._of[1] == W_enc._version:
            return
        encoder = feature_major(W_enc)
        F, d = encoder.shape
        if self.copy.shape != encoder.shape or self.copy.device != encoder.device:
            self.copy = torch.empty(F, d, dtype=torch.bfloat16, device=encoder.device)
            self.norm, self.rest = encoder.new_empty(F), encoder.new_empty(F)
        self._fill(encoder)
        self.is_of(W_enc)

    @abstractmethod
    def _fill(self, encoder: torch.Tensor) -> None:
        """Writes copy, norm and rest of encoder [F, d]."""
