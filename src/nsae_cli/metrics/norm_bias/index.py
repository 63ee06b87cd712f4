"""nbi, the norm bias index: does the relative error of a row rise or fall with its norm?"""

from __future__ import annotations

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

    nbi = 0 is not "fair": the norm also decides what a row says. Compare autoencoders on the same rows.
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
        low = high = None
        if contexts > 1:
            slopes = _resampled_slopes(self._moments, resamples, seed)
            slopes = slopes[~slopes.isnan()]
            if len(slopes):
                low, high = torch.quantile(slopes, torch.tensor(_INTERVAL, dtype=torch.float64)).tolist()
        total = self._moments.sum(0)
        return {
            "nbi": number(slope_of_moments(total).item()),
            "low": low,
            "high": high,
            "rows": int(total[0]),
            "contexts": contexts,
        }

    def _compact(self) -> None:
        ids, moments = zip((self._ids, self._moments), *self._pending, strict=True)
        self._ids, self._moments = _add_up(torch.cat(ids), torch.cat(moments))
        self._pending = []


def _add_up(ids: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the moments [M, 5] of equal ids [M]; returns the distinct ids, rising, and their sums."""
    distinct, place = ids.unique(return_inverse=True)
    return distinct, torch.zeros(len(distinct), 5, dtype=torch.float64).index_add_(0, place, moments)


def _resampled_slopes(moments: Tensor, resamples: int, seed: int) -> Tensor:
    """Slopes after drawing as many contexts as there are, with replacement: [C, 5] → [resamples]."""
    contexts = len(moments)
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _DRAWS_PER_CHUNK // contexts)
    slopes = []
    for start in range(0, resamples, step):
        draws = torch.randint(contexts, (min(step, resamples - start), contexts), generator=generator)
        # The sums are linear in how often a context was drawn.
        times = torch.zeros(draws.shape, dtype=torch.float64)
        times.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand(draws.shape))
        slopes.append(slope_of_moments(times @ moments))
    return torch.cat(slopes)
