"""The objective, in raw units and in the scaled units in which training runs.

Raw:     L  = mean over rows of [n^(−p)·‖e‖² + β·n^(−q)·S(f)],  n = ‖x‖₂ of the raw row
Scaled:  x' = s·x, n' = s·n, e' = s·e, S' = s^h·S  gives  L' = s^(2−p)·L with β' = β·s^(2−p+q−h).

`--l2-norm cosine` has 2(1 − cos(x, x̂)) in place of n^(−p)·‖e‖²: of degree 0 in s, as that is at p = 2, so p is 2.

h is the degree of S under x → s·x with the SAE rescaled along (docs/theory.md): 1 for relu with l1, 0 for tanh-relu
with l1, whose acts do not change. L' has the same minimum as L; Adam does not see the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli.kernels.distance import COSINE_DISTANCE, SQUARED_ERROR
from nsae_cli.kernels.types import Distance
from nsae_cli.sae.nonlinearity import Nonlinearity, is_homogeneous, make_nonlinearity
from nsae_cli.sae.penalty import PENALTIES, SparsityPenalty

L2_POWER = {"none": 0, "norm": 1, "sq": 2}
L1_POWER = {"none": 0, "norm": 1}
#: Of each `--l2-norm` its p and what the loss measures: all degrees follow from p.
ERROR_TERMS: dict[str, tuple[int, Distance]] = {
    **{name: (power, SQUARED_ERROR) for name, power in L2_POWER.items()},
    "cosine": (2, COSINE_DISTANCE),
}
DECODERS = ("unit", "free", "bounded")
ALPHA_SCALES = ("layer-norm", "none", "note")

#: Defaults per activation: sparsity coefficient α (topk and batchtopk need none), penalty, decoder.
DEFAULT_ALPHA = {"relu": 0.2, "tanh-relu": 0.03, "topk": 0.0, "batchtopk": 0.0, "jumprelu": 0.003}
DEFAULT_SPARSITY = {"relu": "l1", "tanh-relu": "l1", "topk": "l1", "batchtopk": "l1", "jumprelu": "l0"}
DEFAULT_DECODER = {"relu": "unit", "tanh-relu": "free", "topk": "unit", "batchtopk": "unit", "jumprelu": "unit"}


def refused_combination(act: str, decoder: str, sparsity: str, l2_norm: str = "none") -> str | None:
    """Why a combination of options cannot work, or None. The reasons are derived in docs/theory.md."""
    if act == "tanh-relu" and decoder == "unit":
        return (
            "--act tanh-relu with --decoder unit: acts stay below 1, so ‖x̂ − b_dec‖ < L0 and high-norm tokens cannot "
            "be reconstructed; use --decoder free or bounded"
        )
    if l2_norm == "cosine" and (reason := _shrinks_for_ever(act, sparsity)) is not None:
        return reason
    if act == "relu" and decoder == "free" and sparsity == "l1":
        return (
            "--act relu with --decoder free and --sparsity l1 has no minimum: acts shrink and W_dec grows without end; "
            "use --decoder unit or bounded"
        )
    if (act == "jumprelu") != (sparsity == "l0"):
        if act == "jumprelu":
            return (
                f"--act jumprelu with --sparsity {sparsity}: its thresholds learn from a count of active features; "
                "use --sparsity l0"
            )
        return (
            f"--act {act} with --sparsity l0: a count of active features has no gradient but in thresholds that learn; "
            "use --act jumprelu"
        )
    return None


def _shrinks_for_ever(act: str, sparsity: str) -> str | None:
    """Why a loss that does not see the length of x̂ has no minimum, or None where its penalty does not see it either."""
    if act in ("relu", "tanh-relu") and sparsity in ("l1-decoder-norm", "tanh"):
        others = "--act jumprelu, topk or batchtopk" + (", or --sparsity l1" if act == "tanh-relu" else "")
    elif act == "relu" and sparsity == "l1":
        others = "--act tanh-relu, jumprelu, topk or batchtopk"
    else:
        return None
    return (
        f"--l2-norm cosine with --act {act} and --sparsity {sparsity} has no minimum: the error does not see how long "
        f"x̂ is, and the penalty falls as x̂ shrinks, without end; use {others}, or another --l2-norm"
    )


@dataclass(frozen=True)
class Objective:
    """The loss of one SAE.

    Attributes:
        act: name of the activation.
        l2_power: p of the weight n^(−p) on the squared error (``--l2-norm``); of cosine 2.
        l1_power: q of the weight n^(−q) on the sparsity penalty (``--l1-norm``).
        sparsity: name of the penalty.
        beta: β, the coefficient of the penalty in raw units at full warm-up.
        input_scale: s of x' = s·x.
        k: of topk and batchtopk.
        bandwidth: of jumprelu, in scaled units.
        distance: D, what the error term measures.
    """

    act: str
    l2_power: int
    l1_power: int
    sparsity: str
    beta: float
    input_scale: float
    k: int | None = None
    bandwidth: float | None = None
    distance: Distance = SQUARED_ERROR

    @classmethod
    def from_run(cls, run: dict[str, Any]) -> Objective:
        """The objective that a run.json describes."""
        config = run["config"]
        l2_power, distance = ERROR_TERMS[config["l2_norm"]]
        return cls(
            act=config["act"],
            l2_power=l2_power,
            l1_power=L1_POWER[config["l1_norm"]],
            sparsity=config["sparsity"],
            beta=run["beta"],
            input_scale=run["input_scale"],
            k=config.get("k"),
            bandwidth=config.get("bandwidth"),
            distance=distance,
        )

    @property
    def nonlinearity(self) -> Nonlinearity:
        return make_nonlinearity(self.act, self.k, self.bandwidth)

    @property
    def penalty(self) -> SparsityPenalty:
        return PENALTIES[self.sparsity]

    @property
    def degree(self) -> int:
        """h: how S scales with x when the SAE is rescaled along."""
        return penalty_degree(self.act, self.sparsity)

    @property
    def loss_scale(self) -> float:
        """L' / L = s^(2−p)."""
        return self.input_scale ** (2 - self.l2_power)

    @property
    def beta_scaled(self) -> float:
        """β' = β·s^(2−p+q−h)."""
        return self.beta * self.input_scale ** (2 - self.l2_power + self.l1_power - self.degree)

    @property
    def weight_power(self) -> int:
        """The power of 1/n in front of D: p, or 0 where D has divided by norms already."""
        return self.l2_power - 2 + self.distance.degree

    def row_weights(self, norm: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of D and S per row [B], n'^(−p) and n'^(−q), of raw norms [B]; both 0 on zero rows."""
        return self._weight(self.weight_power, norm, zero), self._weight(self.l1_power, norm, zero)

    def squared_error_weight(self, weight: torch.Tensor, norm: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """What a squared error beside D has to be weighed with to be of its degree, [B]; `weight` is that of D."""
        return weight * self._weight(2 - self.distance.degree, norm, zero)

    def _weight(self, power: int, norm: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        scaled = torch.where(zero, torch.ones_like(norm), norm * self.input_scale)
        return scaled.pow(-power) * (~zero).to(norm.dtype)

    def error_terms(self, x: torch.Tensor, x_hat: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """What a row's error costs, in raw units: n^(−p)·‖e‖², or 2(1 − c); float64 [B].

        Args:
            x, x_hat: raw rows [B, d], none of them zero.
            norm: n as stored [B].
        """
        measured = self.distance.measure_(x.double(), x_hat.double().clone())
        return measured.value * norm.double().pow(-self.weight_power)


def penalty_degree(act: str, sparsity: str) -> int:
    """h of a penalty: 1 if S(f) grows like ‖x‖ when the SAE is rescaled along with x, 0 if it stays."""
    if sparsity == "l1":
        return 1 if is_homogeneous(act) else 0
    return 1 if sparsity == "l1-decoder-norm" else 0


def beta_from_alpha(
    alpha: float, alpha_scale: str, objective_powers: tuple[int, int, int], norm_scale: float, mean_power: float
) -> float:
    """β of `--alpha` and `--alpha-scale`.

    ``layer-norm``: β = α·ñ^(2−p−h+q): layers of different norm feel the same sparsity pressure.
    ``none``: β = α.
    ``note``: β = α·mean(n^(2−p)), the founding note's rule; right for tanh-relu where norms are robust, wrong for relu.

    Args:
        objective_powers: (p, q, h).
        norm_scale: ñ, the geometric mean of n over non-sink rows.
        mean_power: mean of n^(2−p) over the training rows.
    """
    p, q, h = objective_powers
    if alpha_scale == "none":
        return alpha
    if alpha_scale == "note":
        return alpha * mean_power
    return alpha * norm_scale ** (2 - p - h + q)
