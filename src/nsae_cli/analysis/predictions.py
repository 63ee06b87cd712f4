"""What theory predicts about norms and SAEs (P1 … P7), each checked against the compared SAEs.

A verdict rests on intervals: confirmed where they lie where they should, refuted where they lie elsewhere, undecided
where they straddle or where there is nothing to look at. P4 is in `predictions_stretched`, P5 and P6 are in
`predictions_layers`, P7 is in `predictions_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nsae_cli.analysis.comparison import Comparison, matched_l0, nbi_rel, reference_row
from nsae_cli.analysis.comparison_cells import NONE, NORM, SQ, Arm, Group, Row, Sae
from nsae_cli.analysis.comparison_statistics import t_interval
from nsae_cli.analysis.prediction_verdicts import (
    Clause,
    Prediction,
    Verdict,
    agreed,
    every,
    lies_within,
    shown,
    shown_interval,
    shown_range,
)
from nsae_cli.analysis.predictions_gradients import gradients_of_sinks
from nsae_cli.analysis.predictions_layers import note_rule_across_layers, own_rule_across_layers
from nsae_cli.analysis.predictions_stretched import origin, permuted, stretch, stretched_norms


def check_predictions(comparison: Comparison) -> list[dict[str, Any]]:
    """Every prediction as {id, statement, verdict, no_data, evidence, clauses, needs}."""
    checks: tuple[Callable[[Comparison], Prediction], ...] = (
        slope_by_loss,
        sinks_given_up,
        explained_variance_with_sinks,
        stretched_norms,
        own_rule_across_layers,
        note_rule_across_layers,
        gradients_of_sinks,
    )
    return [check(comparison).document() for check in checks]


def as_collected(comparison: Comparison) -> list[Group]:
    """The groups whose stores were not altered."""
    return [group for group in comparison.groups if not group.altered]


def _arm_rows(groups: Sequence[Group], arm: Arm) -> Iterator[tuple[Group, Row]]:
    for group in groups:
        for row in group.rows:
            if row.arm == arm:
                yield group, row


def _place(group: Group, row: Row) -> str:
    return f"{row.arm.name}, L0 {row.level.label} ({group.label})"


# P1


def slope_by_loss(comparison: Comparison) -> Prediction:
    """P1: nbi_rel is negative for (p, q) = (0, 0), about 0 for (1, 0), positive for (2, 0)."""
    prediction = Prediction(
        "P1",
        "nbi_rel < 0 for relu (p, q) = (0, 0), within ±.15 for (1, 0), > 0 for (2, 0); with norms permuted over "
        "directions all of them shrink towards 0",
    )
    groups = as_collected(comparison)
    bounds = {NONE: (-math.inf, 0.0), NORM: (-0.15, 0.15), SQ: (0.0, math.inf)}
    for arm, (low, high) in bounds.items():
        found = False
        for group, row in _arm_rows(groups, arm):
            values = _present(nbi_rel(group, row))
            if values:
                found = True
                prediction.clauses.append(_slope_clause(comparison, prediction, group, row, values, low, high))
        if not found:
            prediction.lacks(f"{arm.name} beside relu p=2 q=1 at equal L0 and seed")
    for l2_norm in ("none", "norm", "sq"):
        for group, row in _arm_rows(groups, Arm("tanh-relu", l2_norm, 0, "plain", ())):
            values = _present(nbi_rel(group, row))
            if values:
                shown_values = f"{shown(float(np.mean(list(values.values()))))} {shown_interval(_t(values.values()))}"
                prediction.remarks.append(f"Beside it {_place(group, row)}: nbi_rel {shown_values}")
    _shrinks_when_permuted(comparison, prediction, list(bounds))
    return prediction


def _present(values: dict[int, float | None]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if value is not None}


def _t(values: Any) -> tuple[float, float] | None:
    return t_interval(list(values))


def _slope_clause(
    comparison: Comparison,
    prediction: Prediction,
    group: Group,
    row: Row,
    values: dict[int, float],
    low: float,
    high: float,
) -> Clause:
    seeds = _t(values.values())
    reference = reference_row(group, row.level)
    assert reference is not None
    pairs = [(row.by_seed[seed], reference.by_seed[seed]) for seed in values]
    resampled = comparison.bootstraps.difference(pairs, "nbi")
    verdicts: list[Verdict] = [lies_within(seeds, low, high)]
    text = f"{_place(group, row)}: nbi_rel {shown(float(np.mean(list(values.values()))))} {shown_interval(seeds)}"
    text += f" over {len(values)} seeds"
    if resampled is None:
        prediction.needs.append("evaluations on common contexts, for intervals over text")
    else:
        verdicts.append(lies_within(resampled[1], low, high))
        text += f", {shown_interval(resampled[1])} over contexts"
    return Clause(agreed(verdicts), text)


def _shrinks_when_permuted(comparison: Comparison, prediction: Prediction, arms: Sequence[Arm]) -> None:
    found = False
    for group in comparison.groups:
        if not permuted(group) or stretch(group) != 1:
            continue
        for before in as_collected(comparison):
            if (before.data, before.hook, before.sinks) != (origin(group), group.hook, group.sinks):
                continue
            for row in group.rows:
                other = before.find(row.arm, row.level)
                if row.arm not in arms or other is None:
                    continue
                after, earlier = _present(nbi_rel(group, row)), _present(nbi_rel(before, other))
                seeds = sorted(after.keys() & earlier.keys())
                if not seeds:
                    continue
                found = True
                shrunk = [abs(earlier[seed]) - abs(after[seed]) for seed in seeds]
                interval = t_interval(shrunk)
                text = (
                    f"{row.arm.name}, L0 {row.level.label}: |nbi_rel| "
                    f"{shown(float(np.mean([abs(earlier[seed]) for seed in seeds])))} on {before.data}, "
                    f"{shown(float(np.mean([abs(after[seed]) for seed in seeds])))} with permuted norms, smaller by "
                    f"{shown(float(np.mean(shrunk)))} {shown_interval(interval)}"
                )
                prediction.clauses.append(Clause(lies_within(interval, 0.0, math.inf), text))
    if not found:
        prediction.lacks("the same SAEs on a copy of the store with norms permuted over directions (nsae alter)")


# P2


def sinks_given_up(comparison: Comparison) -> Prediction:
    """P2: relu (2, 0) with sinks kept gives sinks up where β·n₀ ≥ 2, and nothing else suffers."""
    prediction = Prediction(
        "P2",
        "relu p=2 with sinks kept and β·n₀ ≥ 2 (n₀ the norm of sinks): MRE of sinks ≥ .9 and their norm ratio ≤ .1; "
        "ΔCE_all ≥ 10 × ΔCE_ns; ΔCE_ns within 10 % of p=1's",
    )
    looked_at = False
    for group, row in _arm_rows([g for g in as_collected(comparison) if g.sinks == "keep"], SQ):
        pulls = {seed: pull for seed, sae in sorted(row.by_seed.items()) if (pull := _pull(sae)) is not None}
        if not pulls:
            continue
        if min(pulls.values()) < 2:
            found = shown_range(list(pulls.values()))
            prediction.remarks.append(f"{_place(group, row)}: β·n₀ {found}, where nothing is predicted below 2")
        saes = [row.by_seed[seed] for seed, pull in pulls.items() if pull >= 2]
        if not saes:
            continue
        looked_at = True
        where = f"{_place(group, row)}, β·n₀ {shown_range([pull for pull in pulls.values() if pull >= 2])}"
        for metric, label, holds in (
            ("mre_sinks", "MRE of sinks", lambda value: value >= 0.9),
            ("norm_ratio_sinks", "norm ratio of sinks", lambda value: value <= 0.1),
        ):
            values = [value for sae in saes if (value := sae.value(metric)) is not None]
            text = f"{where}: {label} {shown_range(values)}" if values else ""
            if values:
                prediction.clauses.append(Clause(every(values, [holds(value) for value in values]), text))
        _behaviour_of_ordinary_tokens(prediction, group, row, saes)
    if not looked_at:
        prediction.lacks("relu p=2 SAEs with sinks kept and β·n₀ ≥ 2, on a hook with sinks at position 0")
    return prediction


def _pull(sae: Sae) -> float | None:
    """β·n₀ of the trained loss; None for a hook without sinks at position 0."""
    sinks = sae.run.get("sinks") or {}
    beta, norm = sae.run.get("beta"), sinks.get("median_position0")
    return None if not sinks.get("position") or beta is None or norm is None else float(beta) * float(norm)


def _behaviour_of_ordinary_tokens(prediction: Prediction, group: Group, row: Row, saes: Sequence[Sae]) -> None:
    both = [(sae.value("delta_ce_all"), sae.value("delta_ce_ns")) for sae in saes]
    ratios = [every_ / ns for every_, ns in both if every_ is not None and ns is not None and ns > 0]
    if not ratios:
        prediction.lacks("evaluations (nsae eval) of the relu p=2 SAEs, for ΔCE")
        return
    text = f"{_place(group, row)}: ΔCE_all ÷ ΔCE_ns {shown_range(ratios)}"
    prediction.clauses.append(Clause(every(ratios, [ratio >= 10 for ratio in ratios]), text))
    other = group.find(NORM, row.level)
    relative = []
    for sae in saes:
        partner = other.by_seed.get(sae.seed) if other else None
        ours, theirs = sae.value("delta_ce_ns"), partner.value("delta_ce_ns") if partner else None
        if partner is not None and ours is not None and theirs and matched_l0(sae, partner):
            relative.append(ours / theirs - 1)
    if not relative:
        prediction.lacks("relu p=1 at the same L0 and seeds, evaluated")
        return
    interval = t_interval(relative)
    text = f"{_place(group, row)}: ΔCE_ns against p=1 {shown(100 * float(np.mean(relative)))} %"
    percent = None if interval is None else (100 * interval[0], 100 * interval[1])
    prediction.clauses.append(Clause(lies_within(interval, -0.1, 0.1), f"{text} {shown_interval(percent)}"))


# P3


def explained_variance_with_sinks(comparison: Comparison) -> Prediction:
    """P3: EV_all − EV_ns = s(1 − EV_ns) within .01 while MRE of sinks < .01; s = sinks' share of Σ‖x − μ_ns‖²."""
    prediction = Prediction(
        "P3",
        "EV_all − EV_ns = s(1 − EV_ns) within .01 while the MRE of sinks is below .01 (s: share of sinks in "
        "Σ‖x − μ_ns‖²)",
    )
    for group in as_collected(comparison):
        saes = [sae for row in group.rows for sae in row.by_seed.values()]
        shares = [share for sae in saes if (share := _sink_variance_share(sae)) is not None]
        fitted = [sae for sae in saes if (mre := sae.value("mre_sinks")) is not None and mre < 0.01]
        if not shares or not fitted:
            continue
        share = float(np.median(shares))
        gaps = []
        for sae in fitted:
            every_, ns = sae.metric("all", "fvu_p0"), sae.metric("ns", "fvu_p0")
            if every_ is not None and ns is not None:
                gaps.append((ns - every_) - share * ns)
        if gaps:
            worst = max(map(abs, gaps))
            text = (
                f"{group.label}: s = {shown(share)}; of {len(gaps)} SAEs with MRE of sinks < .01 the largest "
                f"|EV_all − EV_ns − s(1 − EV_ns)| is {shown(worst)}"
            )
            verdict: Verdict = "confirmed" if worst <= 0.01 else "refuted"
            prediction.clauses.append(Clause(verdict, text))
    if not prediction.clauses:
        prediction.lacks("SAEs whose MRE of sinks is below .01, on a hook with sinks")
    return prediction


def _sink_variance_share(sae: Sae) -> float | None:
    """s from the SAE's own sums: Σ‖x − μ_ns‖² of a scope is Σ‖e‖² ÷ FVU. It is a property of the rows."""
    totals = {}
    for scope in ("all", "sinks"):
        tokens, mse, fvu = (sae.metric(scope, key) for key in ("tokens", "mse", "fvu_p0"))
        if not tokens or mse is None or not fvu:
            return None
        totals[scope] = tokens * mse / fvu
    return totals["sinks"] / totals["all"]
