"""What can be measured of any autoencoder, one's own or one from elsewhere, on rows with norms and groups.

Only `reconstruct` is asked of it. What needs the loss that an SAE was trained with is added by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.groups import NON_SINKS, SINKS
from nsae_cli.metrics.norm_bias import EffectiveBatchFraction, MeasuredExponents, NormBiasIndex, NormMoments
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.store.batches import HookRows

#: Entries of one batch's acts at most; bounds the memory of an evaluation.
_ACTS_ENTRIES = 2**21

#: Called with a batch size, yields the evaluated rows, zero rows left out, with their context numbers [B].
RowSource = Callable[[int], Iterator[tuple[HookRows, torch.Tensor]]]


def evaluation_batch(d_sae: int) -> int:
    """Rows per batch whose acts take a bounded amount of memory."""
    return max(64, min(8192, _ACTS_ENTRIES // d_sae))


@dataclass(frozen=True)
class ReconstructedRows:
    """A batch of rows and what an autoencoder made of them.

    Attributes:
        rows: norms, groups and raw x of the rows, in the storage dtype.
        contexts: which context each row belongs to, int64 [B].
        x: float32 [B, d_in].
        acts: [B, d_sae] ≥ 0.
        x_hat: [B, d_in].
    """

    rows: HookRows
    contexts: torch.Tensor
    x: torch.Tensor
    acts: torch.Tensor
    x_hat: torch.Tensor

    @cached_property
    def sq_error(self) -> torch.Tensor:
        """‖x̂ − x‖², float64 [B]."""
        error = self.x_hat.double() - self.x.double()
        return torch.linalg.vecdot(error, error)

    @cached_property
    def rho(self) -> torch.Tensor:
        """ρ = ‖x̂ − x‖² / ‖x‖², float64 [B]."""
        x = self.x.double()
        return self.sq_error / torch.linalg.vecdot(x, x)

    @property
    def non_sinks(self) -> torch.Tensor:
        """Which rows are no sinks, bool [B]."""
        return self.rows.group != SINKS


@torch.no_grad()
def reconstruct(sae: Autoencoder, rows: HookRows, contexts: torch.Tensor) -> ReconstructedRows:
    """What `sae` makes of raw rows, without noise."""
    x = rows.x.float()
    acts, x_hat = sae.reconstruct(x)
    return ReconstructedRows(rows, contexts, x, acts, x_hat)


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: {all, ns, sinks, bins}, ready for JSON; docs/metrics.md defines every number.
        density: on which share of the rows each feature fires, float64 [d_sae].
        index: the sums per context from which nbi follows, for comparisons with another SAE.
    """

    metrics: dict[str, Any]
    density: torch.Tensor
    index: NormBiasIndex


class Measurements:
    """The numbers of one autoencoder that need no objective; streaming.

    Args:
        d_in, d_sae: shape of the autoencoder.
        mean: x̄ [d_in] of all rows to come; without it `saelens_explained_variance_legacy` is None.
        l2_power: p of the loss n^(−p)‖e‖² whose shares are asked for.
        l1_power: q of its sparsity term n^(−q)·S.
    """

    def __init__(
        self, d_in: int, d_sae: int, mean: torch.Tensor | None = None, l2_power: int = 0, l1_power: int = 0
    ) -> None:
        self._l2_power, self._l1_power = l2_power, l1_power
        self._reconstruction = ReconstructionAccumulator(d_in, mean)
        self._features = FeatureAccumulator(d_sae)
        self._index, self._weights, self._exponents = NormBiasIndex(), EffectiveBatchFraction(), MeasuredExponents()
        self.moments = NormMoments()

    @torch.no_grad()
    def update(
        self, batch: ReconstructedRows, penalty: torch.Tensor | None = None, error_terms: torch.Tensor | None = None
    ) -> None:
        """Adds rows, zero rows left out.

        Args:
            batch: the rows.
            penalty: S per row [B]; Σ f_i where it is None.
            error_terms: what the loss charges for each row's error [B]; n^(−p)‖e‖² where it is None.
        """
        rows, acts = batch.rows, batch.acts
        l0, l1 = (acts > 0).sum(dim=1), acts.sum(dim=1)
        penalty = l1 if penalty is None else penalty
        norm = rows.norm.double()
        loss = norm.pow(-self._l2_power) * batch.sq_error if error_terms is None else error_terms
        self._reconstruction.update(batch.x, batch.x_hat, rows.norm, rows.group, l0, l1, penalty, loss)
        self._features.update(acts, rows.norm, rows.group)
        self._index.update(batch.contexts, rows.norm, batch.rho, batch.non_sinks)
        self._weights.update(loss)
        sparsity = norm.pow(-self._l1_power) * penalty.double()
        self._exponents.update(norm, {"loss": loss, "sparsity": sparsity}, batch.non_sinks)
        self.moments.update(rows.norm, rows.group)

    def compute(self) -> Evaluation:
        """Everything, over the rows so far."""
        metrics: dict[str, Any] = dict(self._reconstruction.compute(self._l2_power, self._l1_power))
        counts = self._features.compute()
        slope = self._index.compute()
        predicted = {"loss": 2 - self._l2_power, "sparsity": None}
        metrics["all"] |= {
            "esf": self._weights.compute(),
            "esf_before_training": self.moments.effective_batch_fraction(self._l2_power),
            "dead_fraction": counts["dead_fraction"],
            "sink_features": counts["n_sink_features"],
        }
        metrics["ns"] |= {
            "esf_before_training": self.moments.effective_batch_fraction(self._l2_power, NON_SINKS),
            "nbi": slope["nbi"],
            "nbi_low": slope["low"],
            "nbi_high": slope["high"],
            "exponents": {
                name: {"measured": measured, "predicted": predicted[name]}
                for name, measured in self._exponents.compute().items()
            },
            "dead_fraction": counts["dead_fraction_ns"],
            "norm_detectors": counts["n_norm_detectors"],
        }
        return Evaluation(metrics, self._features.density(), self._index)


def evaluate_reconstruction(
    sae: Autoencoder, rows: RowSource, l2_power: int = 0, l1_power: int = 0, batch: int | None = None
) -> Evaluation:
    """Every number that needs no objective: reconstruction, features, nbi, and the shares of a loss with these powers.

    Args:
        sae: any autoencoder, in raw units.
        rows: source of the rows; called twice.
        l2_power: p of the loss whose `loss_share`, `bias_ratio` and `esf` are asked for.
        l1_power: q of n^(−q)·Σ f_i, whose share `l1_share` is.
        batch: rows at a time; None: as many as keep the memory bounded.
    """
    batch = batch or evaluation_batch(sae.d_sae)
    measurements = Measurements(sae.d_in, sae.d_sae, mean_row(sae.d_in, rows, batch), l2_power, l1_power)
    for part, contexts in rows(batch):
        measurements.update(reconstruct(sae, part, contexts))
    return measurements.compute()


def mean_row(d_in: int, rows: RowSource, batch: int) -> torch.Tensor:
    """x̄, the mean of all rows, float64 [d_in] on the CPU; 0 without rows."""
    total, count = torch.zeros(d_in, dtype=torch.float64), 0
    for part, _ in rows(batch):
        total += part.x.double().sum(dim=0).cpu()
        count += len(part.norm)
    return total / max(1, count)
