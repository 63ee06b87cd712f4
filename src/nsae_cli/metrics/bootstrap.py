"""Percentile intervals of statistics of sums over contexts, resampled context by context.

Rows of one context are not independent, so contexts are drawn: as many as there are, with replacement. The draws depend
on their number and the seed alone, so that statistics of the same contexts are resampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nsae_cli.metrics.undefined import number

RESAMPLES = 1000
SEED = 0
_INTERVAL = (0.025, 0.975)
# Draws of a context held at a time (16 bytes each).
_DRAWS_PER_CHUNK = 1 << 21

Interval = dict[str, float | None]
Statistics = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def intervals(
    columns: Mapping[str, Tensor], statistics: Statistics, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Interval]:
    """{name: {value, low, high}} of statistics of sums, with 95 % percentile intervals.

    Args:
        columns: by name one value per context, float64 [contexts].
        statistics: from sums over contexts, [...] each, to statistics [...]; NaN or infinite where undefined.
        resamples: how often to draw.
        seed: of the draws.

    Returns:
        None for what is undefined. Resamples in which a statistic is undefined are left out; low and high are None
        below two contexts.
    """
    names = list(columns)
    table = torch.stack([columns[name].double() for name in names], dim=1)
    values = statistics(dict(zip(names, table.sum(dim=0).unbind(), strict=True)))
    bounds: dict[str, tuple[float | None, float | None]] = dict.fromkeys(values, (None, None))
    if len(table) > 1:
        sums = torch.cat([times @ table for times in _draw_counts(len(table), resamples, seed)])
        for name, drawn in statistics(dict(zip(names, sums.unbind(dim=1), strict=True))).items():
            bounds[name] = _bounds(drawn)
    # `+ 0.0` makes no negative zero of a difference that vanishes.
    return {
        name: {"value": number(float(value) + 0.0), "low": bounds[name][0], "high": bounds[name][1]}
        for name, value in values.items()
    }


def _draw_counts(contexts: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each context was drawn, some resamples at a time: float64 [resamples, contexts] in all."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _DRAWS_PER_CHUNK // contexts)
    for start in range(0, resamples, step):
        draws = torch.randint(contexts, (min(step, resamples - start), contexts), generator=generator)
        counts = torch.zeros(draws.shape, dtype=torch.float64)
        yield counts.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand(draws.shape))


def _bounds(drawn: Tensor) -> tuple[float | None, float | None]:
    finite = drawn[drawn.isfinite()]
    if not len(finite):
        return None, None
    low, high = torch.quantile(finite, torch.tensor(_INTERVAL, dtype=torch.float64)).tolist()
    return low + 0.0, high + 0.0
