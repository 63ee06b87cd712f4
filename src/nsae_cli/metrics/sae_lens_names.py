"""SAELens' names for what nsae measures by the same formula, so that tables of both can be laid side by side.

What SAELens computes otherwise has no alias: `kl_div_with_sae` (over every position, the last of a context too),
`explained_variance_legacy` and `relative_reconstruction_bias` (batch by batch), `l2_ratio` (a mean of ratios).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: SAELens' name → where nsae has it: in the scope `all` of the row metrics, or among the numbers on behaviour.
_ROW_METRICS = {
    "reconstruction_quality/explained_variance": "saelens_explained_variance",
    "reconstruction_quality/mse": "mse",
    "reconstruction_quality/cossim": "cosine",
    "sparsity/l0": "l0",
    "sparsity/l1": "l1",
}
_BEHAVIOUR = {
    "model_performance_preservation/ce_loss_without_sae": "ce_clean",
    "model_performance_preservation/ce_loss_with_sae": "ce_with_sae",
    "model_performance_preservation/ce_loss_with_ablation": "ce_zero",
    "model_performance_preservation/ce_loss_score": "ce_recovered_zero",
}


def sae_lens_names(metrics: Mapping[str, Any], behaviour: Mapping[str, Any]) -> dict[str, float | None]:
    """{SAELens' name: value}.

    Args:
        metrics: row metrics by scope.
        behaviour: of `metrics.behaviour`.
    """
    rows = {name: metrics["all"][key] for name, key in _ROW_METRICS.items() if key in metrics["all"]}
    return rows | {name: behaviour[key]["value"] for name, key in _BEHAVIOUR.items()}
