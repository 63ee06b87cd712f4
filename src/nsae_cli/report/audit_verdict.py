"""audit.json as sentences: what high-norm tokens do to this SAE. No sentence claims what the numbers do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsae_cli.report import format as fmt

#: Explained variance that moves by less is called the same.
_SAME = 0.01
#: γ within this of 1 is called unbiased.
_UNBIASED = 0.02
#: ΔCE that differs by less of itself is called the same.
_SAME_COST = 0.02
#: MRE from which a group is called given up.
_GIVEN_UP = 0.9


def audit_verdict(audit: Mapping[str, Any]) -> list[str]:
    """One sentence or two on each of: explained variance, sinks, error, norm bias, behaviour."""
    found = (_variance(audit), _sinks(audit), _error(audit), _bias(audit), _behaviour(audit))
    return [text for text in found if text]


def sinks_name(audit: Mapping[str, Any]) -> str:
    """``position 0`` where every sink is there, else ``the 12 sinks``."""
    sinks = audit["sinks"]
    if sinks.get("only_position0"):
        return "position 0"
    count = sinks["evaluated"]
    return "the one sink" if count == 1 else f"the {fmt.count(count)} sinks"


def _variance(audit: Mapping[str, Any]) -> str:
    metrics, sinks = audit["metrics"], audit["sinks"]
    every, ordinary = metrics["all"].get("explained_variance"), metrics["ns"].get("explained_variance")
    if not sinks["evaluated"]:
        return (
            f"There is no sink at {audit['hook']}: its explained variance {_ev(ordinary)} is that of ordinary tokens."
        )
    if every is None or ordinary is None:
        return ""
    who = sinks_name(audit)
    share = fmt.plain_percent(fmt.quotient(sinks["evaluated"], audit["rows"]["rows"]))
    hold = fmt.plain_percent(sinks.get("share_sq"))
    one = sinks.get("only_position0") or sinks["evaluated"] == 1
    why = f"{'it is' if one else 'they are'} {share} of the tokens and hold{'s' * bool(one)} {hold} of Σ‖x‖²"
    if every - ordinary > _SAME:
        return f"Its explained variance {_ev(every)} falls to {_ev(ordinary)} without {who}: {why}."
    if ordinary - every > _SAME:
        return f"Its explained variance {_ev(every)} rises to {_ev(ordinary)} without {who}: {why}."
    return f"Its explained variance is {_ev(every)} with and {_ev(ordinary)} without {who}: {why}."


def _ev(value: float | None) -> str:
    """Three decimals, as explained variance is usually given; not rounded up to 1."""
    if value is None:
        return fmt.MISSING
    return f"{value:.3f}" if not 0.9995 <= value < 1 else f"{value:.5f}"


def _sinks(audit: Mapping[str, Any]) -> str:
    scope, groups = audit["metrics"]["sinks"], audit["groups"]
    parts = []
    error, ratio = scope.get("mre"), scope.get("norm_ratio")
    if audit["sinks"]["evaluated"] and error is not None:
        who = sinks_name(audit)
        who = who[0].upper() + who[1:]
        if error >= _GIVEN_UP and ratio is not None and ratio <= 0.1:
            parts.append(f"{who}: given up, reconstructions have {fmt.plain_percent(ratio)} of the length.")
        else:
            others = audit["metrics"]["ns"].get("mre")
            against = "" if others is None else f", against {fmt.plain(others)} of ordinary tokens"
            parts.append(f"{who}: mean relative error {fmt.plain(error)}{against}.")
    top, other, bottom = (groups[key] for key in ("top", "other", "bottom"))
    share = fmt.plain_percent(audit["top"])
    values = [part["l0"]["mean"] for part in (top, other, bottom)]
    if all(value is not None for value in values):
        mine, others, low = (fmt.plain(value) for value in values)
        parts.append(
            f"The top {share} by norm uses {mine} features a token (L0), the bottom {share} {low}, the others "
            f"{others}; it holds {fmt.plain_percent(top['l1_share'])} of all L1."
        )
    return " ".join(parts)


def _error(audit: Mapping[str, Any]) -> str:
    scope = audit["metrics"]["ns"]
    error, gamma = scope.get("mre"), scope.get("shrinkage")
    if error is None:
        return ""
    text = (
        f"Ordinary tokens have a mean relative error of {fmt.plain(error)}: "
        f"{fmt.plain(scope.get('direction_error'))} of direction, {fmt.plain(scope.get('magnitude_error'))} of length"
    )
    if gamma is None:
        return f"{text}."
    how = "neither too short nor too long" if abs(gamma - 1) <= _UNBIASED else "too short" if gamma < 1 else "too long"
    return f"{text}; reconstructions are {how} (γ {fmt.number(gamma)})."


def _bias(audit: Mapping[str, Any]) -> str:
    scope, bins = audit["metrics"]["ns"], audit["metrics"]["bins"]
    slope, low, high = (scope.get(key) for key in ("nbi", "nbi_low", "nbi_high"))
    if slope is None:
        return ""
    interval = "" if low is None or high is None else f", 95 % interval {fmt.number(low)} to {fmt.number(high)}"
    text = f"nbi {fmt.number(slope)}{interval}"
    if low is not None and high is not None and low <= 0 <= high:
        text = f"Among ordinary tokens the relative error shows no trend with the norm ({text})"
    else:
        change = 2.0**slope - 1
        text = (
            f"Among ordinary tokens the relative error {'rises' if slope > 0 else 'falls'} with the norm ({text}): by "
            f"{fmt.plain_percent(abs(change), 2)} where the norm doubles"
        )
    ends = [bins[place].get("shrinkage") for place in (0, -1)] if bins else [None, None]
    if None not in ends:
        text += f"; γ is {fmt.number(ends[0])} in the lowest tenth of norms and {fmt.number(ends[1])} in the highest"
    relative = audit.get("nbi_rel")
    if relative is None:
        return f"{text}. Norm goes with content, so that 0 need not be fair: --reference compares with another SAE."
    bounds = f"95 % interval {fmt.number(relative['low'])} to {fmt.number(relative['high'])}"
    if relative["nbi_rel"] is None or relative["low"] is None or relative["high"] is None:
        return f"{text}."
    if relative["low"] <= 0 <= relative["high"]:
        verdict = "shows the same norm bias, as far as can be told, as"
    else:
        verdict = "is less hard on long tokens than" if relative["nbi_rel"] < 0 else "is harder on long tokens than"
    difference = f"nbi_rel {fmt.number(relative['nbi_rel'])}, {bounds}"
    return f"{text}. It {verdict} {relative['reference']} ({difference})."


def _behaviour(audit: Mapping[str, Any]) -> str:
    behaviour = audit.get("behaviour")
    if behaviour is None:
        return ""
    every, ordinary = behaviour["delta_ce_all"]["value"], behaviour["delta_ce_ns"]["value"]
    if every is None or ordinary is None:
        return ""
    clean = fmt.plain(behaviour["ce_clean"]["value"])
    text = f"Spliced in everywhere it costs the model {_nats(every)} of cross-entropy (clean {clean})"
    if audit["sinks"]["evaluated"]:
        if abs(every - ordinary) <= _SAME_COST * abs(every):
            text += ", as much if the sinks are spared"
        else:
            most = ": most of the damage is done at the sinks" if ordinary > 0 and every >= 2 * ordinary else ""
            text += f", and {_nats(ordinary)} if the sinks are spared{most}"
    recovered = [
        f"{fmt.plain_percent(behaviour[key]['value'])} against {what} ablation"
        for key, what in (("ce_recovered_zero", "zero"), ("ce_recovered_mean", "mean"))
        if behaviour[key]["value"] is not None
    ]
    return f"{text}." + (f" Loss recovered: {', '.join(recovered)}." if recovered else "")


def _nats(value: float) -> str:
    return f"{fmt.plain(value)} nats"
