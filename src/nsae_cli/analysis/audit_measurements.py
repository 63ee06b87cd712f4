"""What an audit measures of an autoencoder on rows: every metric of an evaluation, and groups and kinds of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.analysis.audited_rows import AuditedRows
from nsae_cli.analysis.row_groups import GROUPS, KINDS, distribution, group_by_norm, kind_of
from nsae_cli.device import one_thread_if_small
from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.norm_bias import NormBiasIndex
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.reporter import Reporter
from nsae_cli.sae.autoencoder import Autoencoder
from nsae_cli.training.measure import Measurements, ReconstructedRows, evaluation_batch, mean_row, reconstruct

_STOPPED = "stopped; nothing was written, run the same command again"

#: What a group reports of `metrics.reconstruction`.
_METRICS = (
    "mre", "direction_error", "magnitude_error", "shrinkage", "norm_ratio", "cosine", "l1_share", "loss_share",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Metrics by scope, groups by norm, kinds by place, and the sums from which nbi follows."""

    metrics: dict[str, Any]
    groups: dict[str, Any]
    kinds: dict[str, Any]
    index: NormBiasIndex


def measure(
    sae: Autoencoder,
    name: str,
    rows: AuditedRows,
    top: float,
    special_token_ids: list[int],
    reporter: Reporter,
) -> Measured:
    """Measures an autoencoder in two passes over the rows: one for their mean, one for all else.

    Shares are those of the plain squared error and of Σ f_i: the loss of someone else's SAE is not known.

    Args:
        sae: on the CPU.
        name: for messages.
        rows: what to measure on.
        top: share of the rows in the top group, and in the bottom group.
        special_token_ids: tokens that make a row special.

    Raises:
        NumericalError: a reconstruction is not finite.
        Interrupted: a signal asked to stop.
    """
    batch_size = evaluation_batch(sae.d_sae)
    by_group = _Comparison(sae, group_by_norm(rows.norm, top), GROUPS)
    by_kind = _Comparison(sae, kind_of(rows.token, rows.position, special_token_ids), KINDS)
    measurements = Measurements(sae.d_in, sae.d_sae, mean_row(sae.d_in, rows.source, batch_size))
    start = 0
    with (
        one_thread_if_small(batch_size * sae.d_in * sae.d_sae, torch.device("cpu")),
        reporter.task(f"measuring {name}", len(rows.norm), "rows") as task,
    ):
        for part, contexts in rows.source(batch_size):
            interrupt.stop_if_requested(_STOPPED)
            batch = reconstruct(sae, part, contexts)
            if not bool(batch.x_hat.isfinite().all()):
                raise catalogue.RECONSTRUCTION_NOT_FINITE(
                    f"{name}: its reconstructions hold NaN or infinity; it does not fit these rows, "
                    f"give the model and hook that it belongs to"
                )
            measurements.update(batch)
            by_group.update(batch, start)
            by_kind.update(batch, start)
            start += len(part.norm)
            task.advance(len(part.norm))
    evaluation = measurements.compute()
    return Measured(evaluation.metrics, by_group.describe(rows), by_kind.describe(rows), evaluation.index)


class _Comparison:
    """Metrics of rows side by side by a label per row; the labels take the places of the first norm bins."""

    def __init__(self, sae: Autoencoder, label: torch.Tensor, names: dict[str, int]) -> None:
        self._label, self._names = label, names
        self._reconstruction = ReconstructionAccumulator(sae.d_in)
        self._features = FeatureAccumulator(sae.d_sae)
        self._l0, self._l1 = torch.zeros(len(label)), torch.zeros(len(label))

    def update(self, batch: ReconstructedRows, start: int) -> None:
        """Adds the rows from number `start` on."""
        part = slice(start, start + len(batch.x))
        acts, norm, label = batch.acts, batch.rows.norm, self._label[part]
        l0, l1 = (acts > 0).sum(dim=1), acts.sum(dim=1)
        self._l0[part], self._l1[part] = l0.float(), l1
        self._reconstruction.update(batch.x, batch.x_hat, norm, label, l0, l1, l1)
        self._features.update(acts, norm, label)

    def describe(self, rows: AuditedRows) -> dict[str, dict[str, Any]]:
        """One entry per name."""
        scopes = self._reconstruction.compute(0, 0)["bins"]
        return {name: self._entry(rows, value, scopes[value]) for name, value in self._names.items()}

    def _entry(self, rows: AuditedRows, value: int, scope: dict[str, Any]) -> dict[str, Any]:
        mask = self._label == value
        norm = rows.norm[mask]
        return {
            "rows": len(norm),
            "norm_min": float(norm.min()) if len(norm) else None,
            "norm_max": float(norm.max()) if len(norm) else None,
            "l0": distribution(self._l0[mask]),
            "l1": distribution(self._l1[mask]),
            **{metric: scope[metric] for metric in _METRICS},
            "exclusive_features": int(self._features.exclusive_features([value]).sum()),
        }
