"""What is undefined is None: a NaN or an infinity never leaves this room."""

from __future__ import annotations

import math

# A variance below this share of the second moment is what float64 sums leave of zero, not a property of the rows.
ROUNDING = 1e-12


def number(value: float) -> float | None:
    """The value, or None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator, or None where the quotient is undefined or not finite."""
    return number(numerator / denominator) if denominator != 0 else None
