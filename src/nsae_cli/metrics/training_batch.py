"""What is logged while training: a few metrics of one batch, for the price of a few vector operations.

Everything is reduced on the rows' device, without a synchronisation, to one small vector that is copied to the host
once. The formulas are those of `reconstruction` and `norm_bias`, taken over the rows of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsae_cli.metrics.groups import N_BINS, N_GROUPS, NON_SINKS, SINKS
from nsae_cli.metrics.norm_bias.slope import MIN_LOG_VARIANCE
from nsae_cli.metrics.undefined import ROUNDING, number, ratio

GROUP_NAMES = ("sinks", *(f"b{b}" for b in range(N_BINS)))
_GROUP_ORDER = (SINKS, *range(N_BINS))

_PER_GROUP = ("rows", "l0", "l1", "rho", "cosine", "error_sq", "x_sq", "x_hat_sq", "dot", "loss", "sparsity")


def by_group_name(values: Sequence[float | None]) -> dict[str, float | None]:
    """{sinks, b0, …, b9} of values in the order of the groups."""
    return {name: values[group] for name, group in zip(GROUP_NAMES, _GROUP_ORDER, strict=True)}


def batch_metrics(
    *,
    x: Tensor,
    norm: Tensor,
    group: Tensor,
    sq_error: Tensor,
    dot: Tensor,
    x_sq: Tensor,
    x_hat_sq: Tensor,
    l0: Tensor,
    l1: Tensor,
    weight_error: Tensor,
    distance: Tensor | None = None,
    penalty: Tensor | None = None,
    weight_sparsity: Tensor | None = None,
    gradient_norms: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Metrics of one training batch. Zero rows (x = 0) count nowhere.

    Args:
        x: [B, d_in].
        norm: n as stored, [B].
        group: int64 [B].
        sq_error: ‖e‖² [B].
        dot: x·x_hat [B].
        x_sq: ‖x‖² [B].
        x_hat_sq: ‖x_hat‖² [B].
        l0: count of f > 0, [B].
        l1: Σ f_i, [B].
        weight_error: w = n^(−p) [B], the weight of D in the loss.
        distance: D [B], what the loss measures; None for ‖e‖².
        penalty: S(f) [B]; None for Σ f_i.
        weight_sparsity: v = n^(−q) [B]; None for q = 0.
        gradient_norms: by parameter the norm of each row's own gradient [B].

    Returns:
        l0_all, l0_ns, l1_all: means.
        fvu_all, fvu_ns: Σ‖e‖² / Σ‖x − μ‖², both with μ the ns mean of this batch.
        mre_ns, cosine_ns: mean ρ = ‖e‖²/‖x‖², mean c; shrinkage_ns: Σ‖x_hat‖² / Σ x_hat·x.
        loss_share: {sinks, b0, …, b9}, shares of Σ w·D; None for a group without rows.
        bias_ratio: the same ÷ the group's share of the rows, [sinks, b0, …, b9].
        l1_share: {sinks, b0, …, b9}, shares of Σ v·S; None for a group without rows, or if no row has any.
        grad_share: by parameter {sinks, b0, …, b9}, shares of the sum of the rows' gradient norms.
        nbi: slope of log ρ on log n over ns rows with ρ > 0.
        exponents: of w‖e‖² (`loss`), v·S (`sparsity`) and each gradient norm (`grad_W_enc`, …): the slope of its
            logarithm on log n over the ns rows where it is positive.
    """
    gradients = {name: values.double() for name, values in (gradient_norms or {}).items()}
    names = [*_PER_GROUP, *(f"grad_{name}" for name in gradients)]
    sq_error, dot, x_sq, x_hat_sq, norm = (t.double() for t in (sq_error, dot, x_sq, x_hat_sq, norm))
    live = (x_sq > 0) & (norm > 0)
    x_sq_or_1 = torch.where(live, x_sq, 1.0)
    rho = sq_error / x_sq_or_1
    cosine = torch.where(x_hat_sq > 0, dot / (x_sq_or_1 * x_hat_sq).sqrt(), 0.0)
    quantities = {
        "rows": torch.ones_like(norm),
        "l0": l0.double(),
        "l1": l1.double(),
        "rho": rho,
        "cosine": cosine,
        "error_sq": sq_error,
        "x_sq": x_sq,
        "x_hat_sq": x_hat_sq,
        "dot": dot,
        "loss": weight_error.double() * (sq_error if distance is None else distance.double()),
        "sparsity": (l1 if penalty is None else penalty).double()
        * (1.0 if weight_sparsity is None else weight_sparsity.double()),
        **{f"grad_{name}": values for name, values in gradients.items()},
    }
    columns = torch.stack([torch.where(live, quantities[name], 0.0) for name in names], dim=1)
    member = torch.nn.functional.one_hot(group, N_GROUPS).double().T  # [N_GROUPS, B]
    ns = live & (group != SINKS)
    sums_of_x = torch.stack([ns.double(), live.double()]) @ x.double()  # over ns, over all: [2, d_in]

    regressed = ["rho", "loss", "sparsity", *(f"grad_{name}" for name in gradients)]
    logs = _log_moments(norm, torch.stack([quantities[name] for name in regressed]), ns)
    on_host = torch.cat([(member @ columns).flatten(), (sums_of_x @ sums_of_x[0]), logs.flatten()]).tolist()
    per_group = torch.tensor(on_host[: N_GROUPS * len(names)], dtype=torch.float64).view(N_GROUPS, -1)
    ns_dot_ns, all_dot_ns, *moments = on_host[N_GROUPS * len(names) :]
    slopes = {
        name: ratio(covariance, variance) if variance > MIN_LOG_VARIANCE else None
        for name, variance, covariance in zip(regressed, moments[::2], moments[1::2], strict=True)
    }

    def totals(groups: slice | int) -> dict[str, float]:
        return dict(zip(names, per_group[groups].reshape(-1, len(names)).sum(0).tolist(), strict=True))

    everything, non_sinks = totals(slice(None)), totals(NON_SINKS)
    by_group = [totals(g) for g in _GROUP_ORDER]

    def shares_of(name: str) -> dict[str, float | None]:
        return {
            group: ratio(g[name], everything[name]) if g["rows"] else None
            for group, g in zip(GROUP_NAMES, by_group, strict=True)
        }

    loss_share = shares_of("loss")
    return {
        "l0_all": ratio(everything["l0"], everything["rows"]),
        "l0_ns": ratio(non_sinks["l0"], non_sinks["rows"]),
        "l1_all": ratio(everything["l1"], everything["rows"]),
        "fvu_all": _fvu(everything, all_dot_ns, ns_dot_ns, non_sinks["rows"]),
        "fvu_ns": _fvu(non_sinks, ns_dot_ns, ns_dot_ns, non_sinks["rows"]),
        "mre_ns": ratio(non_sinks["rho"], non_sinks["rows"]),
        "cosine_ns": ratio(non_sinks["cosine"], non_sinks["rows"]),
        "shrinkage_ns": ratio(non_sinks["x_hat_sq"], non_sinks["dot"]) if non_sinks["dot"] > 0 else None,
        "loss_share": loss_share,
        "bias_ratio": [
            None if share is None else number(share * everything["rows"] / g["rows"])
            for share, g in zip(loss_share.values(), by_group, strict=True)
        ],
        "l1_share": shares_of("sparsity"),
        "grad_share": {name: shares_of(f"grad_{name}") for name in gradients},
        "nbi": slopes.pop("rho"),
        "exponents": slopes,
    }


def _log_moments(norm: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Variance of log n and its covariance with log value over the rows where that is positive; 0 without rows.

    Args:
        norm: n [B].
        values: one quantity a line, [V, B].
        rows: bool [B].

    Returns:
        [V, 2]
    """
    taken = rows & (values > 0)
    share = taken.double() / taken.sum(1, keepdim=True).clamp(min=1)
    log_norm = torch.where(rows, norm, 1.0).log()
    log_value = torch.where(taken, values, 1.0).log()
    centred = log_norm - (share @ log_norm)[:, None]
    variance = (share * centred.square()).sum(1)
    mean = (share * log_value).sum(1, keepdim=True)
    return torch.stack([variance, (share * centred * (log_value - mean)).sum(1)], dim=1)


def _fvu(total: dict[str, float], sum_dot_ns_sum: float, ns_sum_sq: float, ns_rows: float) -> float | None:
    """Σ‖e‖² / Σ‖x − μ‖² with μ = s/k: s the sum of x over the k ns rows, ns_sum_sq = ‖s‖².

    Σ‖x − μ‖² = Σ‖x‖² − 2 (Σx)·s/k + N‖s‖²/k², with sum_dot_ns_sum = (Σx)·s.
    """
    if ns_rows == 0:
        return None
    variance = total["x_sq"] - 2 * sum_dot_ns_sum / ns_rows + total["rows"] * ns_sum_sq / ns_rows**2
    return ratio(total["error_sq"], variance) if variance > ROUNDING * total["x_sq"] else None
