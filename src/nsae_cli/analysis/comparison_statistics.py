"""Intervals of paired differences, and what may be concluded from them.

Two sources of chance are kept apart: the seed of a training (Student's t over paired seeds) and the text that was held
out (bootstrap over contexts of the seed mean). A conclusion needs both intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nsae_cli.metrics.norm_bias.slope import slope_of_moments

LEVEL = 0.95
DRAWS = 1000
#: Draws of a context that are held at a time (8 bytes each, twice).
_DRAWS_PER_CHUNK = 1 << 21

Interval = tuple[float, float]
Direction = Literal["lower", "higher", "none"]
Mark = Literal["better", "worse", "lower", "higher", "equivalent", "undecided"]


def t_quantile(df: int, level: float = LEVEL) -> float:
    """The t with P(|T| ≤ t) = level for Student's distribution with `df` ≥ 1 degrees of freedom.

    By bisection of the closed form of P for whole df, in θ = arctan(t/√df).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, df) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(df)


def _t_probability(angle: float, df: int) -> float:
    """P(|T| ≤ √df·tan θ): a finite sum of powers of cos θ (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2:
        term = total = cosine if df > 1 else 0.0
        for factor in range(2, df - 2, 2):
            term *= cosine**2 * factor / (factor + 1)
            total += term
        return 2 / math.pi * (angle + sine * total)
    term = total = 1.0
    for factor in range(1, df - 2, 2):
        term *= cosine**2 * factor / (factor + 1)
        total += term
    return sine * total


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """mean ± t·sd/√n with n − 1 degrees of freedom; None below two values."""
    count = len(values)
    if count < 2:
        return None
    mean, half = float(np.mean(values)), t_quantile(count - 1, level) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean - half, mean + half


def percentile_interval(draws: np.ndarray, level: float = LEVEL) -> Interval | None:
    """The middle `level` of bootstrap draws [R]; draws without a value (NaN) are left out."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_counts(contexts: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each context is drawn when as many as there are are drawn with replacement: blocks [rows, contexts].

    The draws depend on the number of contexts and the seed alone, so that SAEs evaluated on the same contexts are
    resampled together.
    """
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWS_PER_CHUNK // contexts)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = generator.integers(contexts, size=(rows, contexts)) + contexts * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * contexts).reshape(rows, contexts).astype(np.float64)


#: Ratio statistics of per-context sums: (numerator, what is taken off it, denominator).
_RATIOS: dict[str, tuple[str, str | None, str]] = {
    "fvu_p0_ns": ("error_sq_ns", None, "variance_ns"),
    "mre_ns": ("rho_ns", None, "rows_ns"),
    "l0_ns": ("l0_ns", None, "rows_ns"),
    "delta_ce_ns": ("ce_ns", "ce_clean", "predicted"),
    "delta_ce_all": ("ce_with_sae", "ce_clean", "predicted"),
}
STATISTICS = (*_RATIOS, "nbi")


def context_statistics(sums: Mapping[str, np.ndarray], counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Metrics from per-context sums, each the ratio of two totals (nbi: the slope of the pooled moments).

    Args:
        sums: per-context sums by name, [contexts] each; `nbi_moments` [contexts, 5]. A metric whose sums are absent
            is left out.
        counts: how often each context counts, [draws, contexts]; None for once each.

    Returns:
        By metric, [draws] (one entry without `counts`); NaN where undefined.
    """
    weights = np.ones((1, len(sums["context"]))) if counts is None else counts
    found: dict[str, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, (above, taken_off, below) in _RATIOS.items():
            if any(key is not None and key not in sums for key in (above, taken_off, below)):
                continue
            numerator = sums[above] - (0.0 if taken_off is None else sums[taken_off])
            found[name] = (weights @ numerator) / (weights @ sums[below].astype(np.float64))
        if "nbi_moments" in sums:
            found["nbi"] = slope_of_moments(torch.from_numpy(weights @ sums["nbi_moments"])).numpy()
    return found


def bootstrap(sums: Mapping[str, np.ndarray], draws: int = DRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Every metric of `context_statistics` for each resample of the contexts, [draws] by metric."""
    blocks = [context_statistics(sums, counts) for counts in resampled_counts(len(sums["context"]), draws, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


@dataclass(frozen=True)
class Judgement:
    """What a difference says, and why where it says nothing.

    Attributes:
        mark: better, worse (lower, higher for a quantity that has no good side), equivalent or undecided.
        reason: why it is undecided, or a remark; empty otherwise.
    """

    mark: Mark
    reason: str = ""


def judge(seeds: Interval | None, contexts: Interval | None, margin: float | None, direction: Direction) -> Judgement:
    """Marks a difference (arm − baseline).

    Equivalent: both intervals lie inside ±margin. Better, worse: both exclude 0 on the same side. Undecided otherwise.

    Args:
        seeds: interval over seeds; None below two.
        contexts: interval over held-out contexts; None without evaluations.
        margin: half width of what counts as no difference; None where nothing does.
        direction: which side is better.
    """
    if seeds is None or contexts is None:
        missing = ["fewer than 2 seeds: no t-interval"] if seeds is None else []
        missing += ["not evaluated on common contexts: no bootstrap"] if contexts is None else []
        return Judgement("undecided", "; ".join(missing))
    both = (*seeds, *contexts)
    sign = 1 if min(both) > 0 else -1 if max(both) < 0 else 0
    if margin is not None and max(map(abs, both)) <= margin:
        return Judgement("equivalent", f"a {'higher' if sign > 0 else 'lower'} value within the margin" if sign else "")
    if not sign:
        straddles = [name for name, (low, high) in (("seeds", seeds), ("contexts", contexts)) if low <= 0 <= high]
        return Judgement("undecided", f"the interval over {' and over '.join(straddles)} holds 0" if straddles else
                         "the two intervals lie on different sides of 0")  # fmt: skip
    side: Mark = "higher" if sign > 0 else "lower"
    if direction == "none":
        return Judgement(side)
    return Judgement("better" if side == direction else "worse")


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation with n − 1 in the denominator (None below two values)."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
