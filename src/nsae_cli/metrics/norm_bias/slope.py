"""Slopes of one logarithm on another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsae_cli.metrics.undefined import number, ratio

# Below this variance of natural logs (a standard deviation of a millionth) values differ by their float32 rounding.
MIN_LOG_VARIANCE = 1e-12


def ols_slope(x: Tensor, y: Tensor) -> float | None:
    """Ordinary least squares slope of y on x, both natural logs, [N]: Σ(x − x̄)(y − ȳ) / Σ(x − x̄)².

    None if x does not vary (standard deviation below 1e-6).
    """
    if len(x) == 0:
        return None
    x, y = x.double(), y.double()
    x = x - x.mean()
    variance = x.square().mean().item()
    return ratio((x * (y - y.mean())).mean().item(), variance) if variance > MIN_LOG_VARIANCE else None


def measured_exponent(norm: Tensor, value: Tensor, mask: Tensor) -> float | None:
    """The k of value ∝ n^k: slope of log value on log n over the masked rows with value > 0 and n > 0.

    Beside it stands the predicted exponent: 2 − p for the loss and gradient norms, h − q for the sparsity term.

    Args:
        norm: n [B].
        value: what is measured, per row [B].
        mask: rows to take, bool [B].
    """
    taken = mask & (value > 0) & (norm > 0)
    return ols_slope(norm[taken].double().log(), value[taken].double().log())


class MeasuredExponents:
    """`measured_exponent` of several quantities, streaming: five float64 sums each."""

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}

    def update(self, norm: Tensor, values: Mapping[str, Tensor], mask: Tensor) -> None:
        """Adds rows: norm n [B], quantities [B] by name, rows to take bool [B]."""
        log_norm = torch.where(mask & (norm > 0), norm, 1.0).double().log()
        for name, value in values.items():
            taken = mask & (norm > 0) & (value > 0)
            x, y = log_norm[taken], value[taken].double().log()
            sums = torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), x.square().sum(), x @ y]).cpu()
            self._moments[name] = self._moments[name] + sums if name in self._moments else sums

    def compute(self) -> dict[str, float | None]:
        """The exponent of each quantity; None where n does not vary over its rows."""
        return {name: number(slope_of_moments(moments).item()) for name, moments in self._moments.items()}


def slope_of_moments(moments: Tensor) -> Tensor:
    """OLS slopes from (N, Σx, Σy, Σx², Σxy) along the last axis: [..., 5] → [...], NaN where undefined."""
    count, x, y, xx, xy = moments.unbind(-1)
    variance = xx / count - (x / count) ** 2
    covariance = xy / count - (x / count) * (y / count)
    return torch.where(variance > MIN_LOG_VARIANCE, covariance / variance, torch.nan)
