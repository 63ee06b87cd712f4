"""The metrics of a finished SAE on held-out rows: what `measure` gives, and what needs the loss it was trained with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from nsae_cli.metrics.groups import N_BINS, N_GROUPS, SINKS
from nsae_cli.metrics.norm_bias import (
    GradShare,
    MeasuredExponents,
    NormMoments,
    alpha_eff,
    per_token_gradient_norms,
)
from nsae_cli.sae.autoencoder import SparseAutoencoder, unfold_input_scale
from nsae_cli.sae.nonlinearity import is_homogeneous
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training.measure import Evaluation, Measurements, RowSource, evaluation_batch, mean_row, reconstruct
from nsae_cli.training.probe import probe_gradient

_PROBE_ROWS = 4096


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, objective: Objective, unit_decoder: bool, rows: RowSource) -> Evaluation:
    """Metrics of `sae` over the rows that `rows(batch_size)` yields, in the scopes all, ns, sinks and bins.

    Args:
        sae: in raw units; evaluated without noise.
        objective: the loss that it was trained with, for loss_share, grad_share and G.
        unit_decoder: whether the decoder's gradient is projected (grad_share, G).
        rows: source of the rows; called three times.
    """
    batch = evaluation_batch(sae.d_sae)
    mean = mean_row(sae.d_in, rows, batch)
    measurements = Measurements(sae.d_in, sae.d_sae, mean, objective.l2_power, objective.l1_power)
    shares, exponents = GradShare(), MeasuredExponents()
    for part, contexts in rows(batch):
        batch_of_rows = reconstruct(sae, part, contexts)
        error_terms = objective.error_terms(batch_of_rows.x, batch_of_rows.x_hat, part.norm)
        in_training = _TrainingUnits(sae, objective, batch_of_rows.acts, batch_of_rows.x_hat, part)
        measurements.update(batch_of_rows, in_training.penalty(), error_terms)
        norms = in_training.gradient_norms(unit_decoder)
        shares.update(norms, part.group)
        exponents.update(part.norm, {f"grad_{name}": norm for name, norm in norms.items()}, batch_of_rows.non_sinks)
    evaluation = measurements.compute()
    metrics = evaluation.metrics
    _add_norm_bias(metrics, objective, measurements.moments, shares)
    found = metrics["ns"]["exponents"]
    if found:
        found["sparsity"]["predicted"] = objective.degree - objective.l1_power
    for name, measured in exponents.compute().items():
        found[name] = {"measured": measured, "predicted": 2 - objective.l2_power}
    projections = _gradient_projections(sae, objective, unit_decoder, rows)
    metrics["sinks"]["G"] = projections[SINKS]
    for scope, projection in zip(metrics["bins"], projections[:N_BINS], strict=True):
        scope["G"] = projection
    return evaluation


def _add_norm_bias(metrics: dict[str, Any], objective: Objective, moments: NormMoments, shares: GradShare) -> None:
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
    """G_b of each group on a probe of the first evaluated rows; None without rows."""
    probe = next((part for part, _ in rows(_PROBE_ROWS)), None)
    if probe is None:
        return [None] * N_GROUPS
    thresholds = None if sae.threshold is None else sae.threshold.double().log()
    raw = dataclasses.replace(sae.weights, log_threshold=thresholds)
    scaled = unfold_input_scale(sae.act, raw, objective.input_scale)
    # batchtopk's rows are evaluated one by one, by a threshold that no gradient moves.
    activation = sae.nonlinearity if objective.act == "batchtopk" else objective.nonlinearity
    return probe_gradient(probe, scaled, objective, activation, objective.beta_scaled, unit_decoder).projections
