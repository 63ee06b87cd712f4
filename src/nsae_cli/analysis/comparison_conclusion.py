"""What the table says, in plain sentences. Every sentence follows from marks and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nsae_cli.analysis.prediction_verdicts import shown, shown_range

#: Arms whose MRE of sinks is above this have given the sinks up.
_LOST = 0.5
_NAMES = {"p=0": "none", "p=1": "norm", "p=2": "sq"}
_QUANTITIES = (("fvu_p0_ns", "FVU of ordinary tokens"), ("delta_ce_ns", "ΔCE with ordinary tokens replaced"))
_ORDER = ("better", "worse", "equivalent", "undecided")


def conclude(
    groups: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], missed: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Sentences from a comparison's groups, predictions and missed targets, at most about half a page."""
    groups = _with_targets([group for group in groups if not group["altered"]] or list(groups))
    against = _against(groups, "p=0")
    sentences = [_what_was_compared(groups, missed)]
    if not against:
        sentences.append("No two arms could be compared: none has a p=0 arm of its activation beside it.")
    main = {arm: found for arm, found in against.items() if _is_plain(arm)}
    sentences += [_marks_of(arm, entries) for arm, entries in main.items()]
    sentences += _shift(groups)
    sentences += _sinks(groups)
    sentences += _without_sinks(_against(groups, "sinks kept"))
    sentences += _others("Controls and baselines", {a: e for a, e in against.items() if a not in main})
    sentences += _others("All arms", _against(groups, "baseline"))
    sentences += _verdicts(predictions)
    sentences += _advice(groups, main)
    return sentences


def _with_targets(groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Only the rows that were meant to have some L0, if there are any: a sweep of α says nothing about arms."""
    kept: list[Mapping[str, Any]] = [
        {**group, "rows": rows}
        for group in groups
        if (rows := [row for row in group["rows"] if row["target_l0"] is not None])
    ]
    return kept or list(groups)


def _is_plain(arm: str) -> bool:
    """An arm that differs from p=0 in p and q alone."""
    return all(part in _NAMES or part == "q=1" for part in arm.split()[1:])


def _against(groups: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[Mapping[str, Any]]]:
    """Comparisons with the p = 0 arm, or with the chosen baseline, by arm and in the table's order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for group in groups:
        for row in group["rows"]:
            for compared in row["comparisons"]:
                if compared["kind"] == kind:
                    found.setdefault(row["arm"], []).append(compared)
    return found


def _what_was_compared(groups: Sequence[Mapping[str, Any]], missed: Sequence[Mapping[str, Any]]) -> str:
    compared = [c for group in groups for row in group["rows"] for c in row["comparisons"]]
    matched = sum(c["status"] == "matched" for c in compared)
    saes = sum(len(row["seeds"]) for group in groups for row in group["rows"])
    text = (
        f"{_count(saes, 'SAE')} in {_count(len(groups), 'group')}; {matched} of {_count(len(compared), 'comparison')} "
    )
    text += "could be made at matched non-sink L0"
    return text + (f", {_count(len(missed), 'SAE')} missed the target L0." if missed else ".")


def _marks_of(arm: str, entries: Sequence[Mapping[str, Any]]) -> str:
    base = entries[0]["with"]
    parts = []
    for metric, label in _QUANTITIES:
        marks = _marks(entries, metric)
        if marks:
            parts.append(f"{label} {_tally(marks)}{_range_of_differences(entries, metric)}")
    left = sum(entry["status"] != "matched" for entry in entries)
    text = f"{arm} against {base}, {_count(len(entries), 'cell')} (a group at an L0): " + "; ".join(
        parts or ["nothing could be compared"]
    )
    return text + (f"; {left} not at matched L0." if left else ".")


def _marks(entries: Sequence[Mapping[str, Any]], metric: str) -> Counter[str]:
    return Counter(
        entry["metrics"][metric]["mark"]
        for entry in entries
        if entry["status"] == "matched" and entry["metrics"].get(metric)
    )


def _tally(marks: Mapping[str, int]) -> str:
    return ", ".join(f"{marks[mark]} {mark}" for mark in _ORDER if marks.get(mark))


def _range_of_differences(entries: Sequence[Mapping[str, Any]], metric: str) -> str:
    """``(−3 % to +1 %)``: the smallest and the largest mean difference among the cells."""
    found = [entry["metrics"][metric] for entry in entries if entry["metrics"].get(metric)]
    if metric == "fvu_p0_ns":
        values = [100 * entry["relative"] for entry in found if entry["relative"] is not None]
        unit, digits = " %", 1
    else:
        values, unit, digits = [entry["difference"] for entry in found], " nats", 4
    if not values:
        return ""
    low, high = (_signed(value, digits) for value in (min(values), max(values)))
    return f" ({low}{unit})" if low == high else f" ({low} to {high}{unit})"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else "0"


def _shift(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the slope of error on norm moves with the loss."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for arm, entries in _against(groups, "p=0").items():
        if _is_plain(arm):
            found[arm] = [e["metrics"]["nbi"] for e in entries if e["status"] == "matched" and e["metrics"].get("nbi")]
    sentences = []
    for arm, entries in found.items():
        marks = Counter(entry["mark"] for entry in entries)
        if not entries:
            continue
        differences = [entry["difference"] for entry in entries]
        tally = ", ".join(f"{marks[mark]} {mark}" for mark in ("higher", "lower", "undecided") if marks[mark])
        sentences.append(f"{arm}: {tally} ({shown_range(differences)})")
    if not sentences:
        return []
    return ["Slope of log relative error on log norm (nbi) against p=0; higher shifts accuracy from long tokens to "
            "short ones: " + "; ".join(sentences) + "."]  # fmt: skip


def _sinks(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    lost: dict[str, list[float]] = {}
    kept: dict[str, list[float]] = {}
    for group in groups:
        for row in group["rows"]:
            value = row["metrics"]["mre_sinks"]["mean"]
            if group["sinks"] == "keep" and value is not None and _is_plain(row["arm"]):
                (lost if value > _LOST else kept).setdefault(row["arm"], []).append(value)
    if not lost and not kept:
        return []
    if not lost:
        return ["No arm trained with sinks gave them up (relative error of sinks at most "
                f"{shown(max(v for values in kept.values() for v in values))})."]  # fmt: skip
    text = "; ".join(
        f"{arm} in {len(values)} of {len(values) + len(kept.get(arm, []))} cells (relative error {shown_range(values)})"
        for arm, values in lost.items()
    )
    return [f"Trained with sinks, these gave them up: {text}."]


def _without_sinks(against: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """FVU of arms trained without sinks against the same arms trained with them."""
    parts = []
    for arm, entries in against.items():
        marks = _marks(entries, "fvu_p0_ns")
        if marks and _is_plain(arm):
            parts.append(f"{arm} {_tally(marks)}{_range_of_differences(entries, 'fvu_p0_ns')}")
    return (
        [f"Trained without sinks, FVU of ordinary tokens against the same with sinks: {'; '.join(parts)}."]
        if parts
        else []
    )


def _others(what: str, against: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """FVU of several arms against what they were compared with, in one sentence."""
    by_base: dict[str, list[str]] = {}
    for arm, entries in against.items():
        marks = _marks(entries, "fvu_p0_ns")
        if marks:
            text = f"{arm} {_tally(marks)}{_range_of_differences(entries, 'fvu_p0_ns')}"
            by_base.setdefault(entries[0]["with"], []).append(text)
    return [f"{what}, FVU of ordinary tokens against {base}: {'; '.join(parts)}." for base, parts in by_base.items()]


def _verdicts(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    by_verdict: dict[str, list[str]] = {}
    for prediction in predictions:
        verdict = "without data" if prediction["no_data"] else prediction["verdict"]
        by_verdict.setdefault(verdict, []).append(prediction["id"])
    if not by_verdict or set(by_verdict) == {"without data"}:
        return []
    order = ("confirmed", "refuted", "undecided", "without data")
    return ["Predictions: " + "; ".join(f"{v} {', '.join(by_verdict[v])}" for v in order if v in by_verdict) + "."]


def _advice(groups: Sequence[Mapping[str, Any]], main: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What follows for the choice of --l2-norm, per activation."""
    sentences = []
    for act in dict.fromkeys(arm.split()[0] for arm in main):
        sentences.append(_advice_for(act, {arm: e for arm, e in main.items() if arm.split()[0] == act}, groups))
    return sentences


def _advice_for(act: str, arms: Mapping[str, Sequence[Mapping[str, Any]]], groups: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for arm, entries in arms.items():
        marks: Counter[str] = Counter()
        for metric, _ in _QUANTITIES:
            marks += _marks(entries, metric)
        option = _option(arm)
        if not marks:
            said.append(f"{option}: nothing is known, no comparison was at matched L0")
        elif set(marks) == {"equivalent"}:
            said.append(
                f"{option} may be chosen freely: on ordinary tokens it is equivalent to none within the margins"
            )
        elif marks["better"] and marks["worse"]:
            said.append(f"{option} helps in some cells and harms in others; look at the row that is yours")
        elif marks["better"]:
            extent = "in every cell" if set(marks) == {"better"} else _some(marks, "better")
            said.append(f"{option} is better than none {extent}")
        elif marks["worse"]:
            extent = "in every cell" if set(marks) == {"worse"} else _some(marks, "worse")
            said.append(f"{option} is worse than none {extent}")
        elif marks["equivalent"]:
            said.append(f"{option} is equivalent to none where that could be decided ({_some(marks, 'equivalent')})")
        else:
            said.append(f"{option} against none is undecided: more seeds or held-out text would be needed")
        if any(
            group["sinks"] == "keep" and row["arm"] == arm and (row["metrics"]["mre_sinks"]["mean"] or 0) > _LOST
            for group in groups
            for row in group["rows"]
        ):
            said[-1] += (
                " (it gives sinks up where they are trained on: use --sinks drop, or splice it in elsewhere only)"
            )
    return f"Choosing --l2-norm for {act}: " + "; ".join(said) + "."


def _some(marks: Mapping[str, int], mark: str) -> str:
    return f"in {marks[mark]} of {sum(marks.values())} judgements"


def _option(arm: str) -> str:
    parts = arm.split()[1:]
    name = _NAMES.get(parts[0], parts[0]) if parts else "none"
    return f"{name} with --l1-norm norm" if "q=1" in parts else name


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
