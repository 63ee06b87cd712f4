"""The objective, in raw units and in the scaled units in which training runs.

Raw:     L  = mean over rows of [n^(−p)·‖e‖² + β·n^(−q)·S(f)],  n = ‖x‖₂ of the raw row
Scaled:  x' = s·x, n' = s·n, e' = s·e, S' = s^h·S  gives  L' = s^(2−p)·L with β' = β·s^(2−p+q−h).

h is the degree of S under x → s·x with the SAE rescaled along (docs/theory.md): 1 for relu with l1, 0 for tanh-relu
with l1, whose acts do not change. L' has the same minimum as L; Adam does not see the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nsae_cli.sae.nonlinearity import Nonlinearity, is_homogeneous, make_nonlinearity
from nsae_cli.sae.penalty import PENALTIES, SparsityPenalty

L2_POWER = {"none": 0, "norm": 1, "sq": 2}
L1_POWER = {"none": 0, "norm": 1}
DECODERS = ("unit", "free", "bounded")
ALPHA_SCALES = ("layer-norm", "none", "note")

#: Defaults per activation: sparsity coefficient α (topk and batchtopk need none), penalty, decoder.
DEFAULT_ALPHA = {"relu": 0.2, "tanh-relu": 0.03, "topk": 0.0, "batchtopk": 0.0, "jumprelu": 0.003}
DEFAULT_SPARSITY = {"relu": "l1", "tanh-relu": "l1", "topk": "l1", "batchtopk": "l1", "jumprelu": "l0"}
DEFAULT_DECODER = {"relu": "unit", "tanh-relu": "free", "topk": "unit", "batchtopk": "unit", "jumprelu": "unit"}


def refused_combination(act: str, decoder: str, sparsity: str) -> str | None:
    """Why a combination of options cannot work, or None. The reasons are derived in docs/theory.md."""
    if act == "tanh-relu" and decoder == "unit":
        return (
            "--act tanh-relu with --decoder unit: acts stay below 1, so ‖x̂ − b_dec‖ < L0 and high-norm tokens cannot "
            "be reconstructed; use --decoder free or bounded"
        )
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


@dataclass(frozen=True)
class Objective:
    """The loss of one SAE.

    Attributes:
        act: name of the activation.
        l2_power: p of the weight n^(−p) on the squared error (``--l2-norm``).
        l1_power: q of the weight n^(−q) on the sparsity penalty (``--l1-norm``).
        sparsity: name of the penalty.
        beta: β, the coefficient of the penalty in raw units at full warm-up.
        input_scale: s of x' = s·x.
        k: of topk and batchtopk.
        bandwidth: of jumprelu, in scaled units.
    """

    act: str
    l2_power: int
    l1_power: int
    sparsity: str
    beta: float
    input_scale: float
    k: int | None = None
    bandwidth: float | None = None

    @classmethod
    def from_run(cls, run: dict[str, Any]) -> Objective:
        """The objective that a run.json describes."""
        config = run["config"]
        return cls(
            act=config["act"],
            l2_power=L2_POWER[config["l2_norm"]],
            l1_power=L1_POWER[config["l1_norm"]],
            sparsity=config["sparsity"],
            beta=run["beta"],
            input_scale=run["input_scale"],
            k=config.get("k"),
            bandwidth=config.get("bandwidth"),
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

    def row_weights(self, norm: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n'^(−p) and n'^(−q) per row [B], of raw norms [B]; both 0 on zero rows."""
        scaled = torch.where(zero, torch.ones_like(norm), norm * self.input_scale)
        live = (~zero).to(norm.dtype)
        return scaled.pow(-self.l2_power) * live, scaled.pow(-self.l1_power) * live


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
