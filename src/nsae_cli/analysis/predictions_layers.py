"""P5 and P6: which rule for β keeps the sparsity equal over layers whose norms differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsae_cli.analysis.comparison import Comparison
from nsae_cli.analysis.comparison_cells import Sae
from nsae_cli.analysis.comparison_statistics import t_interval
from nsae_cli.analysis.prediction_verdicts import Clause, Prediction, lies_within, shown, shown_interval
from nsae_cli.sae.objective import DEFAULT_DECODER, DEFAULT_SPARSITY, L1_POWER, L2_POWER

_OWN = "layer-norm"
Act = Literal["relu", "tanh-relu"]


@dataclass(frozen=True)
class _Sweep:
    """One α on several layers: the non-sink L0 of each, and how β followed the layers' typical norm ñ."""

    alpha: float
    layers: tuple[str, ...]
    l0: tuple[float, ...]
    beta_exponent: float | None

    @property
    def cv(self) -> float:
        """Standard deviation over layers (n − 1) ÷ mean."""
        return float(np.std(self.l0, ddof=1) / np.mean(self.l0))


Key = tuple[str, int, int, str, int]


def own_rule_across_layers(comparison: Comparison) -> Prediction:
    """P5: each activation has the smallest spread of L0 over layers with its own rule."""
    prediction = Prediction(
        "P5",
        "over layers tanh-relu needs β ∝ ñ^(2−p+q) and relu ñ^(1−p+q), which is what layer-norm gives each: a smaller "
        "CV of non-sink L0 than with another exponent",
    )
    sweeps = _sweeps(comparison)
    acts: tuple[Act, ...] = ("relu", "tanh-relu")
    for act in acts:
        before = len(prediction.clauses)
        for p, q in sorted({(key[1], key[2]) for key in sweeps if key[0] == act}):
            own = (1 if act == "relu" else 2) - p + q
            # β of `none` does not depend on ñ; that of `note` goes like ñ^(2−p), which is tanh-relu's own at q = 0.
            for rule, exponent in (("none", 0), ("note", 2 - p)):
                _compare(prediction, sweeps, (act, p, q), rule, decides=exponent != own)
        if len(prediction.clauses) == before:
            prediction.lacks(f"{act} at one α on at least 3 layers with --alpha-scale layer-norm and none")
    return prediction


def note_rule_across_layers(comparison: Comparison) -> Prediction:
    """P6: the note's β makes relu's L0 less uniform over layers than layer-norm."""
    prediction = Prediction(
        "P6",
        "the rule note (β = α·mean n^(2−p), sinks included) makes relu's L0 less uniform over layers than layer-norm",
    )
    sweeps = _sweeps(comparison)
    for p, q in sorted({(key[1], key[2]) for key in sweeps if key[0] == "relu"}):
        _compare(prediction, sweeps, ("relu", p, q), "note", decides=True)
    if not prediction.clauses:
        prediction.lacks("relu at one α on at least 3 layers with --alpha-scale layer-norm and note")
    return prediction


def _compare(
    prediction: Prediction, sweeps: dict[Key, list[_Sweep]], arm: tuple[str, int, int], rule: str, *, decides: bool
) -> None:
    """CV with another rule − CV with layer-norm, paired by seed."""
    act, p, q = arm
    pairs = []
    for key, others in sorted(sweeps.items()):
        if key[:4] != (act, p, q, rule):
            continue
        own = sweeps.get((act, p, q, _OWN, key[4]))
        if own:
            # Of several α those whose sparsity is most alike: the spread depends on where one is.
            pairs.append(min(((a, b) for a in own for b in others), key=lambda pair: _distance(*pair)))
    pairs = [(own, other) for own, other in pairs if own.layers == other.layers]
    if not pairs:
        return
    differences = [other.cv - own.cv for own, other in pairs]
    interval = t_interval(differences)
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    text = (
        f"{act} p={p}{f' q={q}' if q else ''}, {len(pairs[0][0].layers)} layers, {len(pairs)} seeds: CV of L0 "
        f"{_shown_cv(ours)} with layer-norm, {_shown_cv(theirs)} with {rule}; larger by "
        f"{shown(float(np.mean(differences)))} {shown_interval(interval)}"
    )
    if decides:
        prediction.clauses.append(Clause(lies_within(interval, 0.0, math.inf), text))
    else:
        prediction.remarks.append(f"{text}; both rules have the same exponent, so this decides nothing")


def _shown_cv(sweeps: Sequence[_Sweep]) -> str:
    exponent = sweeps[0].beta_exponent
    followed = "" if exponent is None else f" (β ∝ ñ^{shown(exponent)})"
    return f"{shown(float(np.mean([sweep.cv for sweep in sweeps])))}{followed}"


def _distance(first: _Sweep, second: _Sweep) -> float:
    return abs(math.log(np.mean(first.l0) / np.mean(second.l0)))


def _sweeps(comparison: Comparison) -> dict[Key, list[_Sweep]]:
    """SAEs of a plain loss at a given α, on at least 3 layers of one store, by (act, p, q, rule, seed)."""
    found: dict[tuple[str, float, Key], dict[str, Sae]] = {}
    for group in comparison.groups:
        if group.altered:
            continue
        for row in group.rows:
            for sae in row.by_seed.values():
                config = sae.config
                if sae.target_l0 is not None or not _is_plain(sae) or not sae.value("l0_ns"):
                    continue
                key = (
                    str(config["act"]),
                    L2_POWER[config["l2_norm"]],
                    L1_POWER[config["l1_norm"]],
                    str(config["alpha_scale"]),
                    sae.seed,
                )
                place = f"{group.data}{group.version} {group.sinks}"
                found.setdefault((place, float(config["alpha"]), key), {})[group.hook] = sae
    sweeps: dict[Key, list[_Sweep]] = {}
    for (_, alpha, key), by_hook in sorted(found.items()):
        if len(by_hook) >= 3:
            hooks = tuple(sorted(by_hook))
            l0 = tuple(value for hook in hooks if (value := by_hook[hook].value("l0_ns")) is not None)
            sweeps.setdefault(key, []).append(_Sweep(alpha, hooks, l0, _beta_exponent([by_hook[h] for h in hooks])))
    return sweeps


def _is_plain(sae: Sae) -> bool:
    config = sae.config
    act = str(config["act"])
    return (
        act in ("relu", "tanh-relu")
        and config["l2_norm"] in L2_POWER
        and config["sparsity"] == DEFAULT_SPARSITY[act]
        and config["decoder"] == DEFAULT_DECODER[act]
        and config.get("row_weights", "plain") == "plain"
        and not config.get("noise")
    )


def _beta_exponent(saes: Sequence[Sae]) -> float | None:
    """Least squares slope of log β on log ñ over the layers."""
    points = [
        (math.log(sae.run["norm_scale"]), math.log(sae.run["beta"]))
        for sae in saes
        if sae.run.get("norm_scale") and sae.run.get("beta")
    ]
    if len(points) < 2 or len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    slope = float(np.polyfit(x, y, 1)[0])
    return 0.0 if abs(slope) < 1e-9 else slope
