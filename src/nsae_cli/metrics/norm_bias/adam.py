"""How much of what Adam divides its steps by comes from sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from nsae_cli.metrics.undefined import ratio


class AdamSinkShare:
    """adam_sink_share = v_S / v: exponential averages of ‖g_S‖² and ‖g‖², with the decay β₂ of Adam's second moment.

    g is the gradient of all parameters on a probe batch, g_S the part of its sinks' rows. Probes are Δ steps apart, so
    an average moves by as many steps at once, as Adam's own would if the gradient stayed as it is between probes:

        v ← β₂^Δ·v + (1 − β₂^Δ)·‖g‖²,   v_S likewise,   both 0 at first, Δ = 1 for the first probe

    The start at 0 shrinks both by the same factor. ‖g‖² = ‖g_S‖² + ‖g_ns‖² + 2⟨g_S, g_ns⟩, so the value is no share in
    the strict sense: it exceeds 1 where sinks and the other rows pull against each other.

    Args:
        beta2: β₂.
    """

    def __init__(self, beta2: float = 0.999) -> None:
        self._beta2 = beta2
        self._averages = torch.zeros(2, dtype=torch.float64)  # v_S, v

    def update(self, sinks_sq: float, total_sq: float, steps: int) -> None:
        """Adds a probe: ‖g_S‖², ‖g‖², and the steps since the one before (1 for the first)."""
        kept = self._beta2**steps
        self._averages = kept * self._averages + (1 - kept) * torch.tensor([sinks_sq, total_sq], dtype=torch.float64)

    def compute(self) -> float | None:
        """v_S / v; None before any probe, or if every gradient was 0."""
        sinks, total = self._averages.tolist()
        return ratio(sinks, total)

    def state(self) -> Tensor:
        """v_S and v, float64 [2]."""
        return self._averages.clone()

    def load_state(self, state: Tensor) -> None:
        """Goes on from `state()`."""
        self._averages = state.clone()
