"""From SAEs to the comparison table: means over seeds, paired differences at matched non-sink L0, and their marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import catalogue
from nsae_cli.analysis.comparison_bootstraps import Bootstraps
from nsae_cli.analysis.comparison_cells import COLUMNS, Arm, Group, Level, Row, Sae, shown_option, sort_into_groups
from nsae_cli.analysis.comparison_statistics import Direction, Interval, judge, mean_and_sd, t_interval
from nsae_cli.values import Fraction

#: Two SAEs are compared where their non-sink L0 differs by at most this share.
L0_TOLERANCE = 0.02
#: Options that a fair comparison holds equal, unless the baseline is chosen.
_BUDGET = frozenset(("tokens", "batch_size", "d_sae"))
#: Columns that are compared, and which side of each is better. nbi is a slope: neither side is.
COMPARED: dict[str, Direction] = {
    "fvu_p0_ns": "lower",
    "mre_ns": "lower",
    "nbi": "none",
    "delta_ce_ns": "lower",
    "delta_ce_all": "lower",
}


class CompareOptions(BaseModel):
    """Options of compare that change its result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline: str | None = Field(None, min_length=1, description="an arm that every arm is also compared with")
    evals: str | None = Field(None, min_length=1, description="use the evaluations of this name only")
    fvu_margin: Fraction = Field(0.02, ge=0, le=1, description="relative difference in FVU and MRE that counts as none")
    ce_margin: float = Field(0.005, ge=0, allow_inf_nan=False, description="nats of ΔCE that count as none")


def compare(saes: Sequence[Sae], options: CompareOptions, poll: Callable[[], None] = lambda: None) -> Comparison:
    """Makes the comparison.

    Args:
        saes: what is compared.
        options: margins and baseline.
        poll: called now and then; may raise to end the work.

    Raises:
        UsageError: two SAEs stand for the same thing, or no arm is called like the baseline.
    """
    groups = sort_into_groups(saes)
    arms = {row.arm.name: row.arm for group in groups for row in group.rows}
    if options.baseline is not None and options.baseline not in arms:
        raise catalogue.BASELINE_UNKNOWN(
            f"--baseline {options.baseline!r} is not among the arms; there are: {', '.join(arms)}"
        )
    return Comparison(groups, options, Bootstraps(poll))


@dataclass
class Comparison:
    """The groups, and everything that is computed from them. `document` gives it as JSON."""

    groups: list[Group]
    options: CompareOptions
    bootstraps: Bootstraps

    def document(self, done: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """A group each: {data, hook, sinks, label, altered, model, …, rows, matrix}. `done` is called after each."""
        described = []
        for group in self.groups:
            described.append(self._group(group))
            done()
        return described

    def rows_differ(self) -> list[str]:
        """SAEs whose FVU_ns over the evaluated contexts is not that of run.json: other rows were evaluated."""
        differ = []
        for sae in (sae for group in self.groups for row in group.rows for sae in row.by_seed.values()):
            there, here = self.bootstraps.value(sae, "fvu_p0_ns"), sae.value("fvu_p0_ns")
            if there is not None and here is not None and abs(there - here) > 0.01 * here:
                differ.append(sae.name)
        return differ

    def _group(self, group: Group) -> dict[str, Any]:
        first = next(iter(group.rows[0].by_seed.values())).run
        return {
            "label": group.label,
            "data": group.data,
            "hook": group.hook,
            "sinks": group.sinks,
            "usual": {name: shown_option(name, value) for name, value in group.usual.items() if value is not None},
            "altered": [dict(change) for change in group.altered] or None,
            **{key: first.get(key) for key in ("model", "embedded_note", "context_size", "packing", "bos")},
            "sink_rows": (first.get("sinks") or {}).get("total"),
            "rows": [self._row(group, row) for row in group.rows],
            "matrix": _matrix(group),
        }

    def _row(self, group: Group, row: Row) -> dict[str, Any]:
        metrics = {}
        for name in COLUMNS:
            mean, sd = mean_and_sd(row.values(name))
            by_seed = {str(seed): row.by_seed[seed].value(name) for seed in sorted(row.by_seed)}
            metrics[name] = {"mean": mean, "sd": sd, "by_seed": by_seed}
        mean, sd = mean_and_sd([value for value in nbi_rel(group, row).values() if value is not None])
        metrics["nbi_rel"] = {
            "mean": mean,
            "sd": sd,
            "by_seed": {str(seed): value for seed, value in nbi_rel(group, row).items()},
        }
        compared = [self.compare_rows(row, other, kind) for kind, other in self._baselines(group, row)]
        if (kept := self._with_sinks_kept(group, row)) is not None:
            compared.append(self.compare_rows(row, kept, "sinks kept"))
        return {
            "arm": row.arm.name,
            "level": row.level.label,
            "target_l0": row.level.target_l0,
            "given_alpha": row.level.alpha,
            "seeds": sorted(row.by_seed),
            "saes": [row.by_seed[seed].name for seed in sorted(row.by_seed)],
            "metrics": metrics,
            "delta_ce_by_bin": _by_bin(row),
            "comparisons": compared,
        }

    def _baselines(self, group: Group, row: Row) -> list[tuple[str, Row]]:
        """What a row is compared with: the p = 0 arm of its activation, and the chosen baseline."""
        found: dict[int, tuple[str, Row]] = {}
        if (plain := _plain_arm(group, row.arm)) is not None and (other := _nearest(group, plain, row)) is not None:
            found[id(other)] = ("p=0", other)
        for arm in {r.arm for r in group.rows if r.arm.name == self.options.baseline and r.arm != row.arm}:
            if (other := _nearest(group, arm, row)) is not None:
                found.setdefault(id(other), ("baseline", other))
        return list(found.values())

    def _with_sinks_kept(self, group: Group, row: Row) -> Row | None:
        """The same arm and target trained with sinks, for one that was trained without."""
        if group.sinks != "drop" or row.level.target_l0 is None:
            return None
        for other in self.groups:
            where = (other.data, other.version, other.hook, other.sinks)
            if where == (group.data, group.version, group.hook, "keep"):
                return other.find(row.arm, row.level)
        return None

    def compare_rows(self, row: Row, other: Row, kind: str = "") -> dict[str, Any]:
        """Paired differences row − other over the seeds whose non-sink L0 match.

        Args:
            row: what is compared.
            other: with what.
            kind: why: ``p=0``, ``baseline``, or ``sinks kept``, where `other` was trained with sinks and `row` without.
        """
        common = sorted(row.by_seed.keys() & other.by_seed.keys())
        seeds = [seed for seed in common if matched_l0(row.by_seed[seed], other.by_seed[seed])]
        result: dict[str, Any] = {
            "with": f"{other.arm.name}, sinks kept" if kind == "sinks kept" else other.arm.name,
            "kind": kind,
            "common_seeds": common,
            "seeds": seeds,
            "l0_ns": _mean(row, "l0_ns", common),
            "l0_ns_with": _mean(other, "l0_ns", common),
            "status": "matched" if seeds else "unmatched L0" if common else "no common seed",
            "metrics": {},
        }
        if seeds:
            pairs = [(row.by_seed[seed], other.by_seed[seed]) for seed in seeds]
            result["metrics"] = {name: self._difference(pairs, name) for name in COMPARED}
        return result

    def _difference(self, pairs: Sequence[tuple[Sae, Sae]], metric: str) -> dict[str, Any] | None:
        values = [(a.value(metric), b.value(metric)) for a, b in pairs]
        both = [(a, b) for a, b in values if a is not None and b is not None]
        if not both:
            return None
        differences = [a - b for a, b in both]
        base = float(np.mean([b for _, b in both]))
        margin = self.margin(metric, base)
        seeds = t_interval(differences)
        resampled = self.bootstraps.difference(pairs, metric)
        judgement = judge(seeds, resampled[1] if resampled else None, margin, COMPARED[metric])
        mean = float(np.mean(differences))
        return {
            "difference": mean,
            "relative": mean / base if base and metric in ("fvu_p0_ns", "mre_ns") else None,
            "seeds": len(both),
            "t_interval": _pair(seeds),
            "bootstrap": None if resampled is None else {"difference": resampled[0], "interval": _pair(resampled[1])},
            "margin": margin,
            "mark": judgement.mark,
            "reason": judgement.reason,
        }

    def margin(self, metric: str, base: float) -> float | None:
        """What counts as no difference, in the metric's unit; None for nbi."""
        if metric in ("fvu_p0_ns", "mre_ns"):
            return self.options.fvu_margin * base
        return self.options.ce_margin if metric.startswith("delta_ce") else None

    def missed(self) -> list[dict[str, Any]]:
        """SAEs whose held-out non-sink L0 is further than 2 % from its target, and what is known of the reason."""
        found = []
        for group in self.groups:
            for row in group.rows:
                for seed, sae in sorted(row.by_seed.items()):
                    target, l0 = sae.target_l0, sae.value("l0_ns")
                    if target is None or (l0 is not None and within_l0_tolerance(l0, target)):
                        continue
                    found.append(
                        {
                            "sae": sae.name,
                            "group": group.label,
                            "arm": row.arm.name,
                            "seed": seed,
                            "target_l0": target,
                            "l0_ns": l0,
                            "why": _why_missed(sae, l0),
                        }
                    )
        return found


def within_l0_tolerance(l0: float, target: float) -> bool:
    """|l0 − target| ≤ 2 % of the target."""
    return abs(l0 - target) <= L0_TOLERANCE * target * (1 + 1e-9)


def matched_l0(first: Sae, second: Sae) -> bool:
    """Held-out non-sink L0 within 2 % of each other, or both within 2 % of the target that they share."""
    a, b = first.value("l0_ns"), second.value("l0_ns")
    if a is None or b is None:
        return False
    if within_l0_tolerance(a, b) or within_l0_tolerance(b, a):
        return True
    target = first.target_l0
    return (
        target is not None
        and target == second.target_l0
        and within_l0_tolerance(a, target)
        and within_l0_tolerance(b, target)
    )


def reference_row(group: Group, level: Level) -> Row | None:
    """The row of the scale-free loss (relu, p = 2, q = 1) without other options, at a level."""
    return next(
        (row for row in group.rows if row.level == level and row.arm == Arm("relu", "sq", 1, "plain", ())), None
    )


def nbi_rel(group: Group, row: Row) -> dict[int, float | None]:
    """nbi − nbi of the (relu, p 2, q 1) SAE of equal L0, seed, hook and data, by seed; None where there is none."""
    reference = reference_row(group, row.level)
    found: dict[int, float | None] = {}
    for seed, sae in sorted(row.by_seed.items()):
        other = reference.by_seed.get(seed) if reference else None
        own, its = sae.value("nbi"), other.value("nbi") if other else None
        usable = other is not None and own is not None and its is not None and matched_l0(sae, other)
        found[seed] = own - its if usable and own is not None and its is not None else None
    return found


def _plain_arm(group: Group, arm: Arm) -> Arm | None:
    """The p = 0 arm of an arm's activation: with the same other options, else with the same budget and no others."""
    budget = tuple(option for option in arm.options if option.partition("=")[0] in _BUDGET)
    arms = {row.arm for row in group.rows} - {arm}
    candidates = [Arm(arm.act, "none", 0, "plain", options) for options in (arm.options, budget)]
    return next((candidate for candidate in candidates if candidate in arms), None)


def _nearest(group: Group, arm: Arm, row: Row) -> Row | None:
    """The row of an arm at the same target; without targets the one whose mean L0 is nearest."""
    same = group.find(arm, row.level)
    if same is not None and row.level.target_l0 is not None:
        return same
    l0 = row.mean("l0_ns")
    others = [(other.mean("l0_ns"), other) for other in group.rows if other.arm == arm]
    measured = [(abs(np.log(other_l0 / l0)), other) for other_l0, other in others if other_l0 and l0]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None


def _matrix(group: Group) -> list[dict[str, Any]]:
    """What SAEs trained with p = 0, 1, 2 score when errors are weighted with p = 0, 1, 2: fvu_p0/p1/p2_ns."""
    lines = []
    for row in group.rows:
        plain = not row.arm.options and row.arm.rows == "plain" and row.arm.q == 0
        if plain and row.arm.act in ("relu", "tanh-relu") and row.arm.l2_norm in ("none", "norm", "sq"):
            line: dict[str, Any] = {"arm": row.arm.name, "level": row.level.label, "l0_ns": row.mean("l0_ns")}
            for key in ("fvu_p0_ns", "fvu_p1_ns", "fvu_p2_ns"):
                line[key] = dict(zip(("mean", "sd"), mean_and_sd(row.values(key)), strict=True))
            lines.append(line)
    return lines


def _by_bin(row: Row) -> list[dict[str, float | None]] | None:
    """Mean and sd over seeds of ΔCE per spliced row, of the ten norm bins and of the sinks."""
    by_seed = [found for sae in row.by_seed.values() if (found := sae.behaviour_by_bin()) is not None]
    if not by_seed:
        return None
    parts = [mean_and_sd([value for value in values if value is not None]) for values in zip(*by_seed, strict=True)]
    return [{"mean": mean, "sd": sd} for mean, sd in parts]


def _mean(row: Row, metric: str, seeds: Sequence[int]) -> float | None:
    return mean_and_sd(row.values(metric, seeds))[0]


def _pair(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else {"low": interval[0], "high": interval[1]}


def _why_missed(sae: Sae, l0: float | None) -> str:
    if l0 is None:
        return "no held-out rows: the store has fewer than 20 contexts"
    told = [str(warning) for warning in sae.run.get("warnings") or [] if "--target-l0" in str(warning)]
    if told:
        return "; ".join(told)
    if sae.config["act"] in ("topk", "batchtopk"):
        return "fewer features than k are positive on some rows" if l0 < (sae.target_l0 or 0) else "k is not held"
    counts: Mapping[str, Any] = sae.run.get("counts") or {}
    alpha, steps = sae.run.get("alpha"), counts.get("steps")
    return f"not recorded; α is {alpha} after {steps} steps"
