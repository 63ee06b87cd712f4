"""What training and analysis need to know about one hook of a store before they begin.

Sinks are found from all rows of the store; the norm scale ñ from all non-sink rows; the edges of the norm bins from
the non-sink training rows. Passes over the store read norms and positions only, except for sink rule 3, which looks at
the vectors of rows that are long enough for it (n > 100). Host memory does not grow with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nsae_cli import catalogue
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
from nsae_cli.store.finite import refuse_non_finite
from nsae_cli.store.shards import ActivationStore


class ProfiledRows(Protocol):
    """The rows of one hook that a profile is made from, in blocks that can be gone through again and again."""

    @property
    def name(self) -> str:
        """What holds the rows, for messages."""

    @property
    def hook(self) -> str:
        """The hook's name."""

    def __len__(self) -> int:
        """Number of blocks."""

    def norms(self, block: int) -> torch.Tensor:
        """n of each row of a block, float32 [rows]."""

    def positions(self, block: int) -> torch.Tensor | None:
        """Index of each row in its context, int64 [rows]; None in every block where they are not known."""

    def massive(self, block: int) -> torch.Tensor | None:
        """Which rows sink rule 3 catches, bool [rows]; None in every block where the vectors are not at hand."""

    def held_out(self, block: int) -> torch.Tensor:
        """Which rows are never trained on, bool [rows]."""


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
    _blocks: ProfiledRows = field(repr=False)

    def flags(self, shard: int, norms: torch.Tensor) -> SinkFlags:
        """Which rows of a shard are sinks, and by which rule. `norms` are the shard's, float32 [rows]."""
        return self.flag_rows(norms, self._blocks.positions(shard), self._blocks.massive(shard))

    def flag_rows(self, norms: torch.Tensor, positions: torch.Tensor | None, massive: torch.Tensor | None) -> SinkFlags:
        """Which rows are sinks, and by which rule.

        Args:
            norms: of the rows, float32 [rows].
            positions: in the context, int64 [rows]; None where they are not known.
            massive: rows that rule 3 catches, bool [rows]; None where the vectors are not at hand.
        """
        return flag_sinks(self.thresholds, norms, positions, massive)

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
        ArtifactError: the store has no rows.
        NumericalError: rows or norms are not finite, or all of them are zero.
    """
    refuse_non_finite(store, hook)
    return profile_rows(_StoreRows(store, hook, contexts))


def profile_rows(rows: ProfiledRows) -> HookProfile:
    """Passes over rows, some times, and returns the profile of their hook.

    Raises:
        ArtifactError: there are no rows.
        NumericalError: norms are not finite, or all of them are zero.
    """
    blocks = range(len(rows))
    thresholds = _thresholds(rows)
    counts = SinkCounts()
    profile = HookProfile(
        rows.hook, thresholds, counts, math.nan, None, 0, 0, 0, (math.nan,) * 3, (math.nan,) * 3, rows
    )
    log_sum, log_rows = 0.0, 0
    sums, sums_ns = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    floor = ZERO_ROW_FRACTION * thresholds.median
    for block in blocks:
        norms = rows.norms(block)
        flags = profile.flags(block, norms)
        counts.update(flags)
        # ñ itself defines what a zero row is; the median, equal to it within a small factor, stands in here.
        positive = norms[~flags.any & (norms > floor)].double()
        log_sum += float(positive.log().sum())
        log_rows += len(positive)
        training = ~rows.held_out(block)
        powers = torch.stack([norms.double().pow(k) for k in range(3)])
        sums += powers[:, training].sum(dim=1)
        sums_ns += powers[:, training & ~flags.any].sum(dim=1)
        profile.training_rows += int(training.sum())
        profile.training_sinks += int((training & flags.any).sum())
    if not log_rows:
        raise catalogue.ALL_ROWS_ZERO(
            f"{rows.name}: every row at {rows.hook} is zero or a sink; there is nothing to measure, collect it again"
        )
    profile.norm_scale = math.exp(log_sum / log_rows)
    profile.mean_power = _means(sums)
    profile.mean_power_ns = _means(sums_ns)

    def training_non_sinks() -> Iterator[torch.Tensor]:
        for block in blocks:
            norms = rows.norms(block)
            keep = ~rows.held_out(block) & ~profile.flags(block, norms).any & ~profile.is_zero(norms)
            yield norms[keep]

    profile.zero_rows = sum(int(profile.is_zero(rows.norms(block)).sum()) for block in blocks)
    _, deciles = stream_quantiles(training_non_sinks, [k / N_BINS for k in range(1, N_BINS)])
    profile.edges = None if deciles is None else torch.tensor(deciles, dtype=torch.float64)
    return profile


def _thresholds(rows: ProfiledRows) -> SinkThresholds:
    def norms(select: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[torch.Tensor]:
        for block in range(len(rows)):
            values = rows.norms(block)
            positions = rows.positions(block)
            yield values if select is None or positions is None else values[select(positions)]

    def median(select: Callable[[torch.Tensor], torch.Tensor] | None) -> float | None:
        _, values = stream_quantiles(lambda: norms(select), [0.5])
        return None if values is None else values[0]

    overall = median(None)
    if overall is None:
        raise catalogue.NOTHING_TO_MEASURE(f"{rows.name} has no rows; collect it again")
    if rows.positions(0) is None:
        return fit_thresholds(overall, None, None)
    return fit_thresholds(overall, median(lambda p: p == 0), median(lambda p: p != 0))


class _StoreRows:
    """A store's rows at one hook, a block per shard."""

    def __init__(self, store: ActivationStore, hook: str, contexts: Contexts) -> None:
        self._store, self._contexts = store, contexts
        self.name, self.hook = store.name, hook
        #: Row numbers by shard: sinks are few, and finding them means reading vectors.
        self._massive: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._store.manifest.shards)

    def norms(self, block: int) -> torch.Tensor:
        return self._store.norms(block, self.hook)

    def positions(self, block: int) -> torch.Tensor | None:
        return self._store.positions(block)

    def held_out(self, block: int) -> torch.Tensor:
        return self._contexts.held_out(block)

    def massive(self, block: int) -> torch.Tensor | None:
        if self.hook not in self._store.manifest.hooks:
            return None
        norms = self.norms(block)
        if block not in self._massive:
            found = find_massive(norms, lambda: self._store.read(block, [self.hook])[self.hook])
            self._massive[block] = found.nonzero().squeeze(1)
        massive = torch.zeros(len(norms), dtype=torch.bool)
        massive[self._massive[block]] = True
        return massive


def find_massive(norms: torch.Tensor, vectors: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Which rows sink rule 3 catches, bool [rows] on the CPU.

    Args:
        norms: n of the rows, on the CPU.
        vectors: gives the rows [rows, d_in]; called only where a row is long enough: max|x_j| ≤ ‖x‖.
    """
    if not bool((norms > MASSIVE_ABSOLUTE).any()):
        return torch.zeros(len(norms), dtype=torch.bool)
    return massive_rows(vectors()).cpu()


def _means(sums: torch.Tensor) -> tuple[float, float, float]:
    rows = float(sums[0])
    means = (sums / rows).tolist() if rows else [math.nan] * 3
    return means[0], means[1], means[2]
