"""What training and analysis need to know about one hook of a store before they begin.

Sinks are found from all rows of the store; the norm scale ñ from all non-sink rows; the edges of the norm bins from
the non-sink training rows. Passes over the store read norms and positions only, except for sink rule 3, which looks at
the vectors of rows that are long enough for it (n > 100). Host memory does not grow with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from nsae_cli.errors import ArtifactError, NumericalError
from nsae_cli.metrics.groups import N_BINS, ZERO_ROW_FRACTION, norm_groups, zero_rows
from nsae_cli.metrics.quantiles import stream_quantiles
from nsae_cli.metrics.sinks import (
    MASSIVE_ABSOLUTE,
    SinkCounts,
    SinkFlags,
    SinkThresholds,
    fit_thresholds,
    flag_sinks,
    massive_rows,
)
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.shards import ActivationStore


@dataclass
class HookProfile:
    """One hook's norms, sinks and bins.

    Attributes:
        hook: the hook's name.
        thresholds: the sink rules' thresholds, from all rows.
        sink_counts: how many rows each rule caught.
        norm_scale: ñ, geometric mean of n over non-sink rows.
        edges: deciles of n over non-sink training rows, [9] float64; None where there are none.
        training_rows: rows that are not held out.
        training_sinks: sinks among them.
        zero_rows: rows with n < 1e-6·ñ.
        mean_power: mean of n^k over training rows, for k = 0, 1, 2 (sinks included).
        mean_power_ns: the same without sinks.
    """

    hook: str
    thresholds: SinkThresholds
    sink_counts: SinkCounts
    norm_scale: float
    edges: torch.Tensor | None
    training_rows: int
    training_sinks: int
    zero_rows: int
    mean_power: tuple[float, float, float]
    mean_power_ns: tuple[float, float, float]
    _massive: list[torch.Tensor | None] = field(repr=False)
    _store: ActivationStore = field(repr=False)

    def flags(self, shard: int, norms: torch.Tensor) -> SinkFlags:
        """Which rows of a shard are sinks, and by which rule. `norms` are the shard's, float32 [rows]."""
        found = self._massive[shard]
        massive = None
        if found is not None:
            massive = torch.zeros(len(norms), dtype=torch.bool)
            massive[found] = True
        return flag_sinks(self.thresholds, norms, self._store.positions(shard), massive)

    def groups(self, norms: torch.Tensor, is_sink: torch.Tensor) -> torch.Tensor:
        """Norm bin 0…9 or the sink group 10 of rows with these norms, int64 [rows]."""
        edges = self.edges if self.edges is not None else torch.full((N_BINS - 1,), math.inf, dtype=torch.float64)
        return norm_groups(norms, edges, is_sink)

    def is_zero(self, norms: torch.Tensor) -> torch.Tensor:
        """Rows that count for nothing (n < 1e-6·ñ), bool [rows]."""
        return zero_rows(norms, self.norm_scale)


def profile_hook(store: ActivationStore, hook: str, contexts: Contexts) -> HookProfile:
    """Passes over the store's norms and positions and returns the profile of one hook.

    Args:
        hook: a stored hook, or one of `norm_hooks` (then sink rule 3, which needs vectors, is off).

    Raises:
        ArtifactError: the store has no rows, or all of them are zero.
        NumericalError: rows or norms are not finite.
    """
    shards = range(len(store.manifest.shards))
    if damaged := sum(entry.nonfinite_rows or 0 for entry in store.manifest.shards):
        raise NumericalError(f"{store.name} has {damaged:,} rows that hold NaN or infinity; collect it again")
    thresholds = _thresholds(store, hook)
    massive = [_massive_rows(store, hook, shard) for shard in shards]
    counts = SinkCounts()
    profile = HookProfile(
        hook, thresholds, counts, math.nan, None, 0, 0, 0, (math.nan,) * 3, (math.nan,) * 3, massive, store
    )
    log_sum, log_rows = 0.0, 0
    sums, sums_ns = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    floor = ZERO_ROW_FRACTION * thresholds.median
    for shard in shards:
        norms = store.norms(shard, hook)
        flags = profile.flags(shard, norms)
        counts.update(flags)
        # ñ itself defines what a zero row is; the median, equal to it within a small factor, stands in here.
        positive = norms[~flags.any & (norms > floor)].double()
        log_sum += float(positive.log().sum())
        log_rows += len(positive)
        training = ~contexts.held_out(shard)
        powers = torch.stack([norms.double().pow(k) for k in range(3)])
        sums += powers[:, training].sum(dim=1)
        sums_ns += powers[:, training & ~flags.any].sum(dim=1)
        profile.training_rows += int(training.sum())
        profile.training_sinks += int((training & flags.any).sum())
    if not log_rows:
        raise ArtifactError(f"{store.name}: every row at {hook} is zero or a sink; there is nothing to measure")
    profile.norm_scale = math.exp(log_sum / log_rows)
    profile.mean_power = _means(sums)
    profile.mean_power_ns = _means(sums_ns)

    def training_non_sinks() -> Iterator[torch.Tensor]:
        for shard in shards:
            norms = store.norms(shard, hook)
            keep = ~contexts.held_out(shard) & ~profile.flags(shard, norms).any & ~profile.is_zero(norms)
            yield norms[keep]

    profile.zero_rows = sum(int(profile.is_zero(store.norms(shard, hook)).sum()) for shard in shards)
    _, deciles = stream_quantiles(training_non_sinks, [k / N_BINS for k in range(1, N_BINS)])
    profile.edges = None if deciles is None else torch.tensor(deciles, dtype=torch.float64)
    return profile


def _thresholds(store: ActivationStore, hook: str) -> SinkThresholds:
    shards = range(len(store.manifest.shards))

    def norms(select: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[torch.Tensor]:
        for shard in shards:
            values = store.norms(shard, hook)
            positions = store.positions(shard)
            yield values if select is None or positions is None else values[select(positions)]

    def median(select: Callable[[torch.Tensor], torch.Tensor] | None) -> float | None:
        _, values = stream_quantiles(lambda: norms(select), [0.5])
        return None if values is None else values[0]

    overall = median(None)
    if overall is None:
        raise ArtifactError(f"{store.name} has no rows")
    if not store.has_positions:
        return fit_thresholds(overall, None, None)
    return fit_thresholds(overall, median(lambda p: p == 0), median(lambda p: p != 0))


def _massive_rows(store: ActivationStore, hook: str, shard: int) -> torch.Tensor | None:
    """Row numbers that sink rule 3 catches; None where the hook's vectors are not stored."""
    if hook not in store.manifest.hooks:
        return None
    # max|x_j| ≤ ‖x‖: rows that are no longer than the threshold need not be read.
    if not bool((store.norms(shard, hook) > MASSIVE_ABSOLUTE).any()):
        return torch.zeros(0, dtype=torch.int64)
    return massive_rows(store.read(shard, [hook])[hook]).nonzero().squeeze(1)


def _means(sums: torch.Tensor) -> tuple[float, float, float]:
    rows = float(sums[0])
    means = (sums / rows).tolist() if rows else [math.nan] * 3
    return means[0], means[1], means[2]
