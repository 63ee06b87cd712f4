"""The metrics of a finished SAE on held-out rows: everything of docs/metrics.md that needs no language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nsae_cli.kernels.decoder import remove_parallel_component_
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.metrics.features import FeatureAccumulator
from nsae_cli.metrics.groups import N_BINS, N_GROUPS, NON_SINKS, SINKS
from nsae_cli.metrics.norm_bias import (
    EffectiveBatchFraction,
    GradShare,
    NormBiasIndex,
    NormMoments,
    alpha_eff,
    group_gradient_projection,
    per_token_gradient_norms,
)
from nsae_cli.metrics.reconstruction import ReconstructionAccumulator
from nsae_cli.sae.autoencoder import SparseAutoencoder, unfold_input_scale
from nsae_cli.sae.nonlinearity import is_homogeneous
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows

#: Entries of one batch's acts at most; bounds the memory of an evaluation.
_ACTS_ENTRIES = 2**21
_PROBE_ROWS = 4096

#: Yields the evaluated rows, zero rows left out, with their context numbers.
RowSource = Callable[[int], Iterator[tuple[HookRows, torch.Tensor]]]


def evaluation_batch(d_sae: int) -> int:
    """Rows per batch whose acts take a bounded amount of memory."""
    return max(64, min(8192, _ACTS_ENTRIES // d_sae))


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder, objective: Objective, unit_decoder: bool, rows: RowSource
) -> tuple[dict[str, Any], torch.Tensor]:
    """Metrics of `sae` over the rows that `rows(batch_size)` yields, in the scopes all, ns, sinks and bins.

    Args:
        sae: in raw units; evaluated without noise.
        objective: the loss that it was trained with, for loss_share, grad_share and G.
        unit_decoder: whether the decoder's gradient is projected (grad_share, G).
        rows: source of the rows; called three times.

    Returns:
        The metrics, ready for JSON (undefined values are None), and the features' densities [d_sae] float64.
    """
    batch = evaluation_batch(sae.d_sae)
    mean = _mean_row(sae.d_in, rows, batch)
    reconstruction = ReconstructionAccumulator(sae.d_in, mean)
    features = FeatureAccumulator(sae.d_sae)
    moments, shares, index, weights = NormMoments(), GradShare(), NormBiasIndex(), EffectiveBatchFraction()
    for part, contexts in rows(batch):
        x = part.x.float()
        acts = sae.encode(x)
        x_hat = sae.decode(acts)
        error = x_hat - x
        sq_error = torch.linalg.vecdot(error.double(), error.double())
        x_sq = torch.linalg.vecdot(x.double(), x.double())
        error_terms = objective.error_terms(x, x_hat, part.norm)
        in_training = _TrainingUnits(sae, objective, acts, x_hat, part)
        l0, l1 = (acts > 0).sum(dim=1), acts.sum(dim=1)
        reconstruction.update(x, x_hat, part.norm, part.group, l0, l1, in_training.penalty(), error_terms)
        features.update(acts, part.norm, part.group)
        moments.update(part.norm, part.group)
        shares.update(in_training.gradient_norms(unit_decoder), part.group)
        index.update(contexts, part.norm, sq_error / x_sq, part.group != SINKS)
        weights.update(error_terms)
    metrics: dict[str, Any] = dict(reconstruction.compute(objective.l2_power, objective.l1_power))
    _add_norm_bias(metrics, objective, moments, shares, index, weights)
    _add_features(metrics, features)
    projections = _gradient_projections(sae, objective, unit_decoder, rows)
    metrics["sinks"]["G"] = projections[SINKS]
    for scope, projection in zip(metrics["bins"], projections[:N_BINS], strict=True):
        scope["G"] = projection
    return metrics, features.density()


def _mean_row(d_in: int, rows: RowSource, batch: int) -> torch.Tensor:
    total, count = torch.zeros(d_in, dtype=torch.float64), 0
    for part, _ in rows(batch):
        total += part.x.double().sum(dim=0)
        count += len(part.norm)
    return total / max(1, count)


def _add_norm_bias(
    metrics: dict[str, Any],
    objective: Objective,
    moments: NormMoments,
    shares: GradShare,
    index: NormBiasIndex,
    weights: EffectiveBatchFraction,
) -> None:
    relative = alpha_eff(moments, objective.l2_power, objective.l1_power, objective.degree)
    by_parameter = shares.compute()

    def scopes(values: Any) -> list[Any]:
        return [values["all"], values["ns"], values["sinks"], *values["bins"]]

    for scope, weight in zip(scopes(metrics), scopes(relative), strict=True):
        scope["alpha_eff"] = weight if objective.beta else None
        scope["grad_share"] = {}
    for parameter, share in by_parameter.items():
        for scope, value in zip(scopes(metrics), scopes(share), strict=True):
            scope["grad_share"][parameter] = value
    metrics["all"]["esf"] = weights.compute()
    metrics["all"]["esf_before_training"] = moments.effective_batch_fraction(objective.l2_power)
    metrics["ns"]["esf_before_training"] = moments.effective_batch_fraction(objective.l2_power, NON_SINKS)
    slope = index.compute()
    metrics["ns"] |= {"nbi": slope["nbi"], "nbi_low": slope["low"], "nbi_high": slope["high"]}


def _add_features(metrics: dict[str, Any], features: FeatureAccumulator) -> None:
    counts = features.compute()
    metrics["all"]["dead_fraction"] = counts["dead_fraction"]
    metrics["ns"]["dead_fraction"] = counts["dead_fraction_ns"]
    metrics["all"]["sink_features"] = counts["n_sink_features"]
    metrics["ns"]["norm_detectors"] = counts["n_norm_detectors"]


class _TrainingUnits:
    """A batch in the scaled units x' = s·x of training, in which penalty and gradients are defined."""

    def __init__(
        self, sae: SparseAutoencoder, objective: Objective, acts: torch.Tensor, x_hat: torch.Tensor, rows: HookRows
    ) -> None:
        s = objective.input_scale
        # The inverse of `fold_input_scale`: relu's acts grow with x, tanh-relu's decoder does.
        acts_scale, decoder_scale = (s, 1.0) if is_homogeneous(sae.act) else (1.0, s)
        self._act_slope = sae.nonlinearity.derivative(acts)
        self._acts = acts * acts_scale
        self._W_dec = sae.weights.W_dec * decoder_scale
        self._x = rows.x.float() * s
        error_weight, sparsity_weight = objective.row_weights(rows.norm, rows.zero)
        # ∂(w·D)/∂x̂ = w·factor·slope stands for 2w·e: of the squared error, slope is e and the factor 2.
        measured = objective.distance.measure_(self._x, x_hat * s)
        self._error = measured.slope
        self._weights = error_weight * (measured.factor / 2), sparsity_weight
        self._objective = objective
        self._norms = self._W_dec.norm(dim=1) if objective.penalty.uses_decoder_norms else None

    def penalty(self) -> torch.Tensor:
        """S per row [B]."""
        return self._objective.penalty.value(self._acts, self._norms).sum(dim=1)

    def gradient_norms(self, unit_decoder: bool) -> dict[str, torch.Tensor]:
        """‖∂L_t/∂W_enc‖ and ‖∂L_t/∂W_dec‖ per row [B]."""
        act_slope, norm_slope = self._objective.penalty.slopes(self._acts, self._norms)
        encoder, decoder = per_token_gradient_norms(
            encoder_input=self._x,
            acts=self._acts,
            act_slope=self._act_slope,
            error=self._error,
            W_dec=self._W_dec,
            error_weight=self._weights[0],
            sparsity_weight=self._weights[1] * self._objective.beta_scaled,
            penalty_slope=torch.as_tensor(act_slope),
            penalty_norm_slope=norm_slope if isinstance(norm_slope, torch.Tensor) else None,
            unit_decoder=unit_decoder,
        )
        return {"W_enc": encoder, "W_dec": decoder}


def _gradient_projections(
    sae: SparseAutoencoder, objective: Objective, unit_decoder: bool, rows: RowSource
) -> list[float | None]:
    """G_b = ⟨g_b, g⟩/‖g‖² of each group on a probe of the first evaluated rows; None without rows."""
    probe = next((part for part, _ in rows(_PROBE_ROWS)), None)
    if probe is None:
        return [None] * N_GROUPS
    s = objective.input_scale
    thresholds = None if sae.threshold is None else sae.threshold.double().log()
    scaled = unfold_input_scale(sae.act, dataclasses.replace(sae.weights, log_threshold=thresholds), s)
    # batchtopk's rows are evaluated one by one, by a threshold that no gradient moves.
    activation = sae.nonlinearity if objective.act == "batchtopk" else objective.nonlinearity
    step = DenseStep()

    def gradient(part: HookRows) -> dict[str, torch.Tensor]:
        error_weight, sparsity_weight = objective.row_weights(part.norm, part.zero)
        gradients = scaled.zeros_like()
        step(
            part.x.float() * s,
            scaled,
            gradients,
            activation=activation,
            penalty=objective.penalty,
            error_weight=error_weight,
            sparsity_weight=sparsity_weight * objective.beta_scaled,
            distance=objective.distance,
        )
        if unit_decoder:
            remove_parallel_component_(gradients.W_dec, scaled.W_dec)
        return gradients.named()

    total = gradient(probe)
    projections: list[float | None] = []
    for group in range(N_GROUPS):
        # One group at a time: a gradient is as large as the SAE.
        rows_of_group = probe.select(probe.group == group)
        part = gradient(rows_of_group) if len(rows_of_group.norm) else None
        projections += group_gradient_projection([part], total)
    return projections
