"""Schedules as pure functions of the step, so that a resumed run needs no state of theirs."""

from __future__ import annotations


def ramp(step: int, steps: int, share: float) -> float:
    """Rises linearly from about 0 to 1 over the first `share` of `steps` (0-based step)."""
    length = share * steps
    return min(1.0, (step + 1) / length) if length > 1 else 1.0


def learning_rate(step: int, steps: int, peak: float, warm_up: float, decay: float) -> float:
    """Linear warm-up over the first `warm_up` of the steps, linear decay to 0 over the last `decay`."""
    left = (steps - step) / max(1.0, decay * steps)
    return peak * ramp(step, steps, warm_up) * min(1.0, left)
