"""Norm bias: how a row's norm decides what the loss, its gradient and the reconstruction make of the row.

weights     esf and alpha_eff: from norms alone, before training, or from measured loss terms
slope       log-log slopes: measured exponents
index       nbi with its bootstrap interval, nbi_rel
gradients   grad_share and G_b
adam        adam_sink_share
"""

from nsae_cli.metrics.norm_bias.adam import AdamSinkShare
from nsae_cli.metrics.norm_bias.gradients import (
    GradShare,
    gradient_norms,
    group_gradient_projection,
    per_token_gradient_norms,
    squared_norm,
)
from nsae_cli.metrics.norm_bias.index import NormBiasIndex, paired_difference
from nsae_cli.metrics.norm_bias.slope import MeasuredExponents, measured_exponent, ols_slope
from nsae_cli.metrics.norm_bias.weights import EffectiveBatchFraction, NormMoments, alpha_eff, effective_batch_fraction

__all__ = [
    "AdamSinkShare",
    "EffectiveBatchFraction",
    "GradShare",
    "MeasuredExponents",
    "NormBiasIndex",
    "NormMoments",
    "alpha_eff",
    "effective_batch_fraction",
    "gradient_norms",
    "group_gradient_projection",
    "measured_exponent",
    "ols_slope",
    "paired_difference",
    "per_token_gradient_norms",
    "squared_norm",
]
