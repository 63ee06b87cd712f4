"""batchtopk's threshold: what a row by itself has to exceed once there is no batch to be compared with."""

from __future__ import annotations

import torch

#: Share of the newest batch in the average.
_NEWEST = 0.01


class BatchThreshold:
    """Running average of the smallest positive act of the training batches (Bussmann et al., 2412.06410).

    The paper takes the expectation over batches of a finished SAE; here it is an exponential average over training,
    ``θ ← θ + 0.01·(least − θ)`` from the first batch's on: about the last 100 steps, in which the learning rate is
    small.

    Args:
        device: of the acts.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._value = torch.full((), torch.nan, dtype=torch.float64, device=device)  # NaN: no batch yet

    def update(self, least_act: torch.Tensor) -> None:
        """Adds a batch; `least_act`: a scalar, ∞ where nothing was active."""
        least = least_act.double()
        moved = torch.where(self._value.isnan(), least, self._value + _NEWEST * (least - self._value))
        self._value = torch.where(least.isfinite(), moved, self._value)

    @property
    def value(self) -> float:
        """θ in the units of the acts; 0 before anything was active."""
        value = float(self._value)
        return value if value == value else 0.0

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {"threshold": self._value}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from `state()`."""
        self._value.copy_(state["threshold"])
