"""How unevenly a loss weighs rows: the effective batch fraction and the relative sparsity weight of a bin."""

from __future__ import annotations

import torch
from torch import Tensor

from nsae_cli.metrics.groups import ALL, N_GROUPS, NON_SINKS, Scoped, group_sums, per_scope
from nsae_cli.metrics.undefined import ratio

# n^k for n^(h−q), n^(2−p) and the square of n^(2−p), with p in {0, 1, 2} and q, h in {0, 1}.
_POWERS = (-1, 0, 1, 2, 4)


def effective_batch_fraction(total: float, total_of_squares: float, count: int) -> float | None:
    """esf = (Σa)² / (N Σa²), from Σa, Σa² and N.

    The share of the rows that would give the same noise if all counted alike: 1 if they do, 1/N if one holds all.
    """
    return ratio(total**2, count * total_of_squares)


class EffectiveBatchFraction:
    """esf of measured weights a ≥ 0, such as a = n^(−p)‖e‖²; streaming."""

    def __init__(self) -> None:
        self._total = 0.0
        self._total_of_squares = 0.0
        self._count = 0

    def update(self, a: Tensor) -> None:
        """Adds rows: a [B]."""
        a = a.double()
        self._total += a.sum().item()
        self._total_of_squares += a.square().sum().item()
        self._count += len(a)

    def compute(self) -> float | None:
        """(Σa)² / (N Σa²), None without rows or if all a are 0."""
        return effective_batch_fraction(self._total, self._total_of_squares, self._count)


class NormMoments:
    """Σ n^k per group for k in {−1, 0, 1, 2, 4}: what the norms alone say before training."""

    def __init__(self) -> None:
        self._sums = torch.zeros(N_GROUPS, len(_POWERS), dtype=torch.float64)

    def update(self, norm: Tensor, group: Tensor) -> None:
        """Adds rows (zero rows left out): norm n [B], group int64 [B]."""
        self._sums += group_sums(torch.stack([norm.double() ** k for k in _POWERS], dim=1), group)

    def total(self, power: int, groups: slice = ALL) -> float:
        """Σ n^power over the groups; power 0 counts the rows."""
        return self._sums[groups, _POWERS.index(power)].sum().item()

    def effective_batch_fraction(self, l2_power: int, groups: slice = ALL) -> float | None:
        """esf at x_hat = 0 over the groups, where a = n^(−p)‖e‖² is n^(2−p)."""
        power = 2 - l2_power
        return effective_batch_fraction(
            self.total(power, groups), self.total(2 * power, groups), int(self.total(0, groups))
        )


def alpha_eff(moments: NormMoments, l2_power: int, l1_power: int, degree: int) -> Scoped[float | None]:
    """Relative sparsity weight of a scope b, from norms alone; 1 over ns.

    [mean_b n^(h−q) / mean_b n^(2−p)] ÷ [mean_ns n^(h−q) / mean_ns n^(2−p)]

    Args:
        moments: of a hook's rows.
        l2_power: p.
        l1_power: q.
        degree: h, the degree of the penalty under x → s·x: 1 or 0.
    """

    def sparsity_over_error(groups: slice) -> float | None:
        # The number of rows divides both means and cancels.
        return ratio(moments.total(degree - l1_power, groups), moments.total(2 - l2_power, groups))

    reference = sparsity_over_error(NON_SINKS)

    def relative(groups: slice) -> float | None:
        weight = sparsity_over_error(groups)
        return None if weight is None or reference is None else ratio(weight, reference)

    return per_scope(relative)
