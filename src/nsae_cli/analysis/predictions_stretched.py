"""P4: on stores whose log norms are stretched, what the loss's divisor changes grows with the spread of norms.

Also what is to be known of the stores that `nsae alter` made.
"""

from __future__ import annotations

import math

import numpy as np

from nsae_cli.analysis.comparison import Comparison, matched_l0
from nsae_cli.analysis.comparison_cells import NONE, NORM, SQ, Group, Row
from nsae_cli.analysis.comparison_statistics import t_interval
from nsae_cli.analysis.prediction_verdicts import Clause, Prediction, lies_within, shown, shown_interval


def stretch(group: Group) -> float:
    """By what the log norms of the group's store were stretched; 1 for a store as collected."""
    return math.prod(float(change["k"]) for change in group.altered if change.get("change") == "stretch-norms")


def permuted(group: Group) -> bool:
    """Whether the norms of the group's store were permuted over directions."""
    return any(change.get("change") == "permute-norms" for change in group.altered)


def origin(group: Group) -> str:
    """The name of the store that the group's store was made from; its own where it was collected."""
    return str(group.altered[0].get("activations")) if group.altered else group.data


def stretched_norms(comparison: Comparison) -> Prediction:
    """P4: with log norms stretched by k, |difference of log FVU_ns between p's| grows like k²."""
    prediction = Prediction(
        "P4",
        "on stores whose log norms are stretched by k, |difference of log FVU_ns between two p's| grows like k² "
        "(exponent between 1.5 and 2.5)",
    )
    families: dict[tuple[str, str, str], dict[float, Group]] = {}
    for group in comparison.groups:
        if not permuted(group):
            families.setdefault((origin(group), group.hook, group.sinks), {})[stretch(group)] = group
    for (store, hook, sinks), by_stretch in sorted(families.items()):
        if len([k for k in by_stretch if k > 0]) < 2:
            continue
        sinks_found = {k: _sinks_found(group) for k, group in sorted(by_stretch.items())}
        if len(set(sinks_found.values())) > 1:
            counts = ", ".join(f"{count} (k {k:g})" for k, count in sinks_found.items())
            prediction.remarks.append(f"{store}, {hook}: the sink rules find other rows at each k: {counts}")
        levels = sorted({row.level for group in by_stretch.values() for row in group.rows}, key=lambda lv: lv.order)
        for level in levels:
            for first, second in ((NONE, NORM), (NONE, SQ), (NORM, SQ)):
                gaps = {k: _gaps(g.find(first, level), g.find(second, level)) for k, g in sorted(by_stretch.items())}
                seeds = set.intersection(*(set(gap) for k, gap in gaps.items() if k > 0))
                if not seeds:
                    continue
                exponents = [_exponent({k: gap[seed] for k, gap in gaps.items() if k > 0}) for seed in sorted(seeds)]
                defined = [exponent for exponent in exponents if exponent is not None]
                interval = t_interval(defined)
                means = ", ".join(f"{shown(float(np.mean(list(gap.values()))))} (k {k:g})" for k, gap in gaps.items()
                                  if gap)  # fmt: skip
                text = (
                    f"{first.name} and {second.name}, L0 {level.label} ({store}, {hook}, sinks {sinks}): "
                    f"|Δ log FVU_ns| {means}; exponent "
                    f"{shown(float(np.mean(defined)) if defined else None)} {shown_interval(interval)}"
                )
                prediction.clauses.append(Clause(lies_within(interval, 1.5, 2.5), text))
    if not prediction.clauses:
        prediction.lacks("relu p=0, 1, 2 at equal L0 on stores stretched by at least two k > 0 (nsae alter)")
    return prediction


def _sinks_found(group: Group) -> int | None:
    """How many rows of the group's store count as sinks."""
    run = next(iter(group.rows[0].by_seed.values())).run
    return (run.get("sinks") or {}).get("total")


def _gaps(first: Row | None, second: Row | None) -> dict[int, float]:
    """|log FVU_ns of one − of the other| by seed, where their L0 match."""
    found: dict[int, float] = {}
    if first is None or second is None:
        return found
    for seed in sorted(first.by_seed.keys() & second.by_seed.keys()):
        a, b = first.by_seed[seed], second.by_seed[seed]
        ours, theirs = a.value("fvu_p0_ns"), b.value("fvu_p0_ns")
        if ours and theirs and matched_l0(a, b):
            found[seed] = abs(math.log(ours) - math.log(theirs))
    return found


def _exponent(by_stretch: dict[float, float]) -> float | None:
    """Least squares slope of log gap on log k."""
    points = [(math.log(k), math.log(gap)) for k, gap in by_stretch.items() if gap > 0]
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])
