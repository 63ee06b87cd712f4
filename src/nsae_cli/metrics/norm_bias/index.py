"""nbi, the norm bias index: does the relative error of a row rise or fall with its norm? And nbi_rel, compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsae_cli.metrics.norm_bias.slope import slope_of_moments
from nsae_cli.metrics.undefined import number

# Draws of a context held at a time while resampling (16 bytes each).
_DRAWS_PER_CHUNK = 1 << 21
# Partial sums kept before those of equal contexts are added up.
_PENDING_LIMIT = 1 << 16
_INTERVAL = (0.025, 0.975)


class NormBiasIndex:
    """nbi = OLS slope (natural logs) of log ρ on log n over ns rows with ρ > 0, streaming.

    Its interval is the 95 % percentile interval of a bootstrap over contexts, since rows of one context are not
    independent. Each context is kept as its five sums (N, Σ log n, Σ log ρ, Σ log² n, Σ log n · log ρ), 48 bytes with
    its number, however many rows it has.

    nbi = 0 is not "fair": the norm also decides what a row says. Compare autoencoders on the same rows
    (`paired_difference`).
    """

    def __init__(self) -> None:
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._moments = torch.zeros(0, 5, dtype=torch.float64)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def update(self, context_id: Tensor, norm: Tensor, rho: Tensor, mask: Tensor) -> None:
        """Adds rows.

        Args:
            context_id: which context a row belongs to, int64 [B], in any order.
            norm: n [B].
            rho: ρ [B]; rows with ρ = 0 are left out.
            mask: ns rows, bool [B].
        """
        taken = mask & (rho > 0) & (norm > 0)
        log_norm, log_rho = norm[taken].double().cpu().log(), rho[taken].double().cpu().log()
        columns = [torch.ones_like(log_norm), log_norm, log_rho, log_norm**2, log_norm * log_rho]
        self._pending.append(_add_up(context_id[taken].cpu(), torch.stack(columns, dim=1)))
        if sum(len(ids) for ids, _ in self._pending) > max(_PENDING_LIMIT, len(self._ids)):
            self._compact()

    def compute(self, resamples: int = 1000, seed: int = 0) -> dict[str, int | float | None]:
        """{nbi, low, high, rows, contexts}.

        Resampled are the contexts that hold at least one row in use; the draws depend on their number and the seed
        alone. A resample in which n does not vary has no slope and is left out. low and high are None below two
        contexts.
        """
        self._compact()
        contexts = len(self._ids)
        low, high = _interval(_resampled_slopes([self._moments], resamples, seed)[0])
        total = self._moments.sum(0)
        return {
            "nbi": number(slope_of_moments(total).item()),
            "low": low,
            "high": high,
            "rows": int(total[0]),
            "contexts": contexts,
        }

    def context_moments(self) -> tuple[Tensor, Tensor]:
        """The contexts in use, rising, int64 [C], and the five sums of each, float64 [C, 5]."""
        self._compact()
        return self._ids.clone(), self._moments.clone()

    def _compact(self) -> None:
        ids, moments = zip((self._ids, self._moments), *self._pending, strict=True)
        self._ids, self._moments = _add_up(torch.cat(ids), torch.cat(moments))
        self._pending = []


def paired_difference(
    moments_a: Tensor, ids_a: Tensor, moments_b: Tensor, ids_b: Tensor, resamples: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """nbi_rel = nbi_a − nbi_b of two autoencoders on the same rows, with a paired bootstrap over contexts.

    Every resample draws the same contexts for both, so that what a context does to both slopes cancels: low and high
    are the 2.5 % and 97.5 % quantiles of the difference. A context in which only one of them has rows in use (ρ > 0)
    counts as empty for the other.

    Args:
        moments_a: per context the five sums of `NormBiasIndex`, float64 [C_a, 5].
        ids_a: the contexts' numbers, each once, int64 [C_a].
        moments_b, ids_b: likewise of the other.
        resamples: draws of as many contexts as there are in both together.
        seed: of the draws, which depend on it and on the number of contexts alone.

    Returns:
        {nbi_rel, low, high}; nbi_rel is None where a slope is undefined, low and high below two contexts.

    Raises:
        ValueError: the two have no context in common, so they were not measured on the same rows.
    """
    if len(ids_a) and len(ids_b) and not bool(torch.isin(ids_a, ids_b).any()):
        raise ValueError("the two share no context: they were not measured on the same rows")
    ids = torch.cat([ids_a, ids_b]).unique()
    both = [
        torch.zeros(len(ids), 5, dtype=torch.float64).index_add_(0, torch.searchsorted(ids, own), moments.double())
        for own, moments in ((ids_a, moments_a), (ids_b, moments_b))
    ]
    slope_a, slope_b = (slope_of_moments(moments.sum(0)) for moments in both)
    resampled_a, resampled_b = _resampled_slopes(both, resamples, seed)
    low, high = _interval(resampled_a - resampled_b)
    return {"nbi_rel": number((slope_a - slope_b).item()), "low": low, "high": high}


def _add_up(ids: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the moments [M, 5] of equal ids [M]; returns the distinct ids, rising, and their sums."""
    distinct, place = ids.unique(return_inverse=True)
    return distinct, torch.zeros(len(distinct), 5, dtype=torch.float64).index_add_(0, place, moments)


def _resampled_slopes(samples: Sequence[Tensor], resamples: int, seed: int) -> list[Tensor]:
    """Slopes of each sample [C, 5] after drawing as many contexts as there are, with replacement: [resamples] each.

    The samples share their contexts and the draws of them.
    """
    contexts = len(samples[0])
    if contexts < 2:
        return [torch.full((0,), torch.nan, dtype=torch.float64) for _ in samples]
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _DRAWS_PER_CHUNK // contexts)
    slopes: list[list[Tensor]] = [[] for _ in samples]
    for start in range(0, resamples, step):
        draws = torch.randint(contexts, (min(step, resamples - start), contexts), generator=generator)
        # The sums are linear in how often a context was drawn.
        times = torch.zeros(draws.shape, dtype=torch.float64)
        times.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand(draws.shape))
        for found, moments in zip(slopes, samples, strict=True):
            found.append(slope_of_moments(times @ moments))
    return [torch.cat(found) for found in slopes]


def _interval(values: Tensor) -> tuple[float | None, float | None]:
    """Quantiles .025 and .975 of the values that are defined; None without any."""
    values = values[~values.isnan()]
    if not len(values):
        return None, None
    low, high = torch.quantile(values, torch.tensor(_INTERVAL, dtype=torch.float64)).tolist()
    return low, high
