"""When features fire and on which rows: density, dead features, sink features, norm detectors."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from nsae_cli.metrics.groups import N_GROUPS, NON_SINKS, SINKS
from nsae_cli.metrics.undefined import ratio

SINK_MASS = 0.9
DETECTOR_CORRELATION = 0.3

# Entries of acts that are searched at a time, which bounds the memory that a dense batch needs.
_CHUNK_ENTRIES = 1 << 22


class FeatureAccumulator:
    """Sums over the rows on which each feature fires (f_i > 0), per group.

    Args:
        d_sae: number of features.
    """

    def __init__(self, d_sae: int) -> None:
        self._rows = torch.zeros(N_GROUPS, dtype=torch.int64)
        self._fired = torch.zeros(N_GROUPS, d_sae, dtype=torch.int64)
        self._mass = torch.zeros(N_GROUPS, d_sae, dtype=torch.float64)  # Σ f_i
        self._fired_norm = torch.zeros(N_GROUPS, d_sae, dtype=torch.float64)  # Σ n over the rows where f_i > 0
        self._norm = torch.zeros(N_GROUPS, dtype=torch.float64)
        self._norm_sq = torch.zeros(N_GROUPS, dtype=torch.float64)

    def update(self, acts: Tensor, norm: Tensor, group: Tensor) -> None:
        """Adds rows (zero rows left out): acts [B, d_sae] ≥ 0, norm n [B], group int64 [B]."""
        norm, group = norm.double().cpu(), group.cpu()
        self._rows += torch.bincount(group, minlength=N_GROUPS)
        self._norm.index_add_(0, group, norm)
        self._norm_sq.index_add_(0, group, norm**2)

        d_sae = self._fired.shape[1]
        step = max(1, _CHUNK_ENTRIES // d_sae)
        for start in range(0, len(acts), step):
            chunk = acts[start : start + step]
            # Only what fires is visited: a sparse code has a few dozen entries in thousands.
            row, feature = chunk.nonzero(as_tuple=True)
            value = chunk[row, feature].double().cpu()
            row, feature = row.cpu() + start, feature.cpu()
            cell = group[row] * d_sae + feature
            self._fired.view(-1).index_add_(0, cell, torch.ones_like(cell))
            self._mass.view(-1).index_add_(0, cell, value)
            self._fired_norm.view(-1).index_add_(0, cell, norm[row])

    def compute(self) -> dict[str, int | float | None]:
        """The counts of this module.

        Returns:
            tokens: rows seen.
            dead_fraction: features silent on every row ÷ d_sae; dead_fraction_ns: on every ns row.
            n_sink_features: see `sink_features`.
            n_norm_detectors: features with |corr(1[f_i > 0], n)| > .3 over ns rows.
        """
        return {
            "tokens": int(self._rows.sum()),
            "dead_fraction": self._silent_fraction(slice(0, N_GROUPS)),
            "dead_fraction_ns": self._silent_fraction(NON_SINKS),
            "n_sink_features": int(self.sink_features().sum()),
            "n_norm_detectors": int((self.norm_correlation().abs() > DETECTOR_CORRELATION).sum()),
        }

    def density(self) -> Tensor:
        """Rows on which a feature fires ÷ rows seen (at least 1): float64 [d_sae]."""
        return self._fired.sum(0).double() / self._rows.sum().clamp(min=1)

    def mass(self) -> Tensor:
        """Σ f_i over all rows: float64 [d_sae]."""
        return self._mass.sum(0)

    def mean_act(self) -> Tensor:
        """Σ f_i ÷ rows on which the feature fires; 0 of one that never does: float64 [d_sae]."""
        return self._mass.sum(0) / self._fired.sum(0).clamp(min=1)

    def sink_share(self) -> Tensor:
        """Σ_S f_i ÷ Σ_all f_i, the share of a feature's activation mass on sinks; NaN without any: float64 [d_sae]."""
        return self._mass[SINKS] / self._mass.sum(0)

    def sink_features(self) -> Tensor:
        """Features that fire, with Σ_S f_i > .9 · Σ_all f_i: bool [d_sae]."""
        return self._mass[SINKS] > SINK_MASS * self._mass.sum(0)

    def exclusive_features(self, groups: Collection[int] = (SINKS,)) -> Tensor:
        """Features that fire on rows of the given groups and on no other row: bool [d_sae]."""
        inside = self._fired[sorted(groups)].sum(0)
        return (inside > 0) & (inside == self._fired.sum(0))

    def norm_correlation(self) -> Tensor:
        """corr(1[f_i > 0], n) over ns rows, float64 [d_sae]; 0 (but for rounding) where either is constant.

        With k of N rows fired, Σ over ns: cov = (Σ_fired n)/N − (k/N)·mean n, divided by √(k/N · (1 − k/N)) · sd n.
        """
        rows = self._rows[NON_SINKS].sum().clamp(min=1)
        rate = self._fired[NON_SINKS].sum(0) / rows.double()
        mean = self._norm[NON_SINKS].sum() / rows
        mean_sq = self._norm_sq[NON_SINKS].sum() / rows
        covariance = self._fired_norm[NON_SINKS].sum(0) / rows - rate * mean
        # Equal norms leave a variance of about ±1e-16·n², hence a spread of 1e-8·n or none, but a covariance of
        # 1e-16·n only: what rounding can make of no correlation is far below any threshold.
        spread = (rate * (1 - rate) * (mean_sq - mean**2).clamp(min=0)).sqrt()
        return torch.where(spread > 0, covariance / spread, 0.0)

    def _silent_fraction(self, groups: slice) -> float | None:
        if not self._rows[groups].any():
            return None
        fired = self._fired[groups].sum(0)
        return ratio(int((fired == 0).sum()), len(fired))
