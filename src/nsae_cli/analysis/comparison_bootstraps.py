"""Resampled metrics of evaluated SAEs, paired by context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsae_cli.analysis.comparison_cells import Sae
from nsae_cli.analysis.comparison_statistics import Interval, bootstrap, context_statistics, percentile_interval


@dataclass(frozen=True)
class _Evaluated:
    """An SAE's per-context metrics: as they are, and for each resample."""

    point: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]


class Bootstraps:
    """Resampled metrics of SAEs, each made once. Equal contexts are resampled alike, so that differences are paired."""

    def __init__(self, poll: Callable[[], None] = lambda: None) -> None:
        self._made: dict[Sae, _Evaluated] = {}
        self._poll = poll

    def difference(self, pairs: Sequence[tuple[Sae, Sae]], metric: str) -> tuple[float, Interval] | None:
        """Mean over pairs of (first − second): its value and its interval over contexts.

        None where an SAE was not evaluated, or two of them on other contexts.
        """
        saes = [sae for pair in pairs for sae in pair]
        if not saes or any(sae.contexts is None for sae in saes) or len({_rows_of(sae) for sae in saes}) > 1:
            return None
        made = [(self._of(first), self._of(second)) for first, second in pairs]
        if any(metric not in side.draws for pair in made for side in pair):
            return None
        interval = percentile_interval(np.mean([a.draws[metric] - b.draws[metric] for a, b in made], axis=0))
        value = float(np.mean([a.point[metric] - b.point[metric] for a, b in made]))
        return None if interval is None or not np.isfinite(value) else (value, interval)

    def value(self, sae: Sae, metric: str) -> float | None:
        """The metric over all evaluated contexts; None where it is undefined or was not evaluated."""
        if sae.contexts is None:
            return None
        value = self._of(sae).point.get(metric)
        return None if value is None or not np.isfinite(value[0]) else float(value[0])

    def _of(self, sae: Sae) -> _Evaluated:
        if sae not in self._made:
            self._poll()
            assert sae.contexts is not None
            self._made[sae] = _Evaluated(context_statistics(sae.contexts), bootstrap(sae.contexts))
        return self._made[sae]


def _rows_of(sae: Sae) -> tuple[Any, ...]:
    """What two SAEs must share to be resampled together: the rows, their contexts and which of these were evaluated."""
    assert sae.evaluation is not None
    assert sae.contexts is not None
    rows = sae.evaluation.get("rows") or {}
    activations = rows.get("activations") or {}
    return (
        rows.get("source"),
        activations.get("manifest_sha256"),
        repr(rows.get("model")),
        repr(rows.get("corpus")),
        rows.get("context_size", sae.evaluation.get("context_size")),
        sae.contexts["context"].tobytes(),
    )
