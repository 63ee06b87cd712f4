"""From gradients to the next weights: projection, clipping, Adam, and the constraint on the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.decoder import (
    bound_rows_,
    clip_norm_,
    gradient_norm,
    normalise_rows_,
    remove_parallel_component_,
)
from nsae_cli.kernels.types import StepResult, Weights


class Gradients(Protocol):
    """What a kernel's `backward` gives: gradients that may still be in a form of its own."""

    @property
    def result(self) -> StepResult:
        """The step's loss terms."""

    @property
    def b_enc(self) -> torch.Tensor:
        """Gradient of b_enc [F]; a NaN or infinity in any gradient shows in a bias's or the threshold's."""

    @property
    def b_dec(self) -> torch.Tensor:
        """Gradient of b_dec [d]."""

    @property
    def log_threshold(self) -> torch.Tensor | None:
        """Gradient of log_threshold [F]; None where there are no thresholds."""

    def full(self) -> Weights:
        """All gradients, in the buffer that `backward` was given."""

    @property
    def can_update(self) -> bool:
        """Whether `update` is there."""

    def update(self, adam: Adam, decoder: str, lr: float) -> None:
        """Adam's step and the decoder's constraint, without the gradients in memory."""


class GradientBuffer:
    """Memory for the gradients of one SAE, taken when first needed.

    Args:
        weights: the parameters.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._gradients: Weights | None = None

    def get(self) -> Weights:
        """The gradients' tensors, laid out as the weights are."""
        if self._gradients is None:
            self._gradients = self._weights.zeros_like()
        return self._gradients

    def release(self) -> None:
        """Gives the memory back."""
        self._gradients = None


class Updater:
    """Takes optimizer steps on one SAE's weights.

    Args:
        weights: updated in place.
        decoder: ``unit``, ``free`` or ``bounded``.
        clip: largest norm of all gradients together, or None.
        norm: of all gradients together, where not all of them are here.
    """

    def __init__(
        self,
        weights: Weights,
        decoder: str,
        clip: float | None,
        norm: Callable[[Weights], torch.Tensor] = gradient_norm,
    ) -> None:
        self.adam = Adam(weights)
        self._norm = norm
        self._weights, self._decoder, self._clip = weights, decoder, clip

    @torch.no_grad()
    def step(self, gradients: Gradients, lr: float) -> None:
        """One step.

        Args:
            gradients: at the present weights.
            lr: learning rate.
        """
        # The norm that clipping needs is known only once all gradients are, so they have to be in memory.
        if self._clip is None and gradients.can_update:
            gradients.update(self.adam, self._decoder, lr)
            return
        full = gradients.full()
        if self._decoder == "unit":
            remove_parallel_component_(full.W_dec, self._weights.W_dec)
        if self._clip is not None:
            clip_norm_(full, self._clip, self._norm)
        self.adam.step(full, lr)
        if self._decoder == "unit":
            normalise_rows_(self._weights.W_dec)
        elif self._decoder == "bounded":
            bound_rows_(self._weights.W_dec)
