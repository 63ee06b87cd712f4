"""audit.json as terminal tables, with the verdict below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

Part = Mapping[str, Any]

_KINDS = (("position0", "position 0"), ("special", "other special"), ("ordinary", "ordinary"))
_SCOPE_NOTE = (
    "EV = 1 − FVU about the mean of the tokens without sinks; SAELens' EV about the mean of all. MRE: mean "
    "‖x̂−x‖²/‖x‖² = direction + length part. γ: 1 = no shrinkage. L0: active features per token; L1: sum of activations."
)


def audit_table(audit: Mapping[str, Any]) -> RenderableType:
    """With and without sinks, groups by norm, kinds by place, norm bins, behaviour, verdict."""
    parts: list[RenderableType] = [_heading(audit), Text(""), _scopes(audit["metrics"]), Text(""), _groups(audit)]
    parts += [Text(""), _bins(audit)]
    if audit.get("behaviour") is not None:
        parts += [Text(""), _behaviour(audit["behaviour"])]
    parts += [Text("")]
    parts += [Text(f"! {warning}", style="yellow") for warning in audit.get("warnings") or []]
    parts += [Text(sentence) for sentence in audit["verdict"]]
    return Group(*parts)


def _heading(audit: Mapping[str, Any]) -> Text:
    sae, rows, sinks = audit["sae"], audit["rows"], audit["sinks"]
    kind = f"{sae['format']} {sae['architecture']}, {fmt.count(audit['d_sae'])} features on {audit['hook']}"
    of = fmt.model_name(audit.get("model"))
    where = "held-out tokens" if rows["held_out"] else "tokens"
    store = audit["options"].get("activations")
    text = f"of the store {store['name']}" if store else f"of {rows.get('corpus')}"
    bos = {True: ", each begins with the BOS token", False: ", cut without the BOS token first"}.get(rows["bos"], "")
    size = f", contexts of {fmt.count(rows['context_size'])}" if rows["context_size"] else ""
    found = _caught(sinks)
    lines = [
        f"{kind}, of {of}",
        f"{fmt.count(rows['rows'])} {where} {text}{size}{bos}",
        *(f"read as: {note}" for note in sae.get("notes") or []),
        f"sinks: {found}",
    ]
    return Text.assemble((f"Audit of {sae['name']}", "bold"), "\n", ("\n".join(lines), "dim"))


def _caught(sinks: Mapping[str, Any]) -> str:
    """What the rules caught."""
    if not sinks["evaluated"]:
        return "none"
    rules = [f"{rule} {fmt.count(sinks[rule])}" for rule in ("position", "norm", "massive") if sinks.get(rule)]
    total = f", of {fmt.count(sinks['total'])} in all rows" if sinks["total"] != sinks["evaluated"] else ""
    ratio = fmt.quotient(sinks.get("median_position0"), sinks.get("median_elsewhere"))
    at_0 = "" if ratio is None else f"; median ‖x‖ at position 0 is {fmt.plain(ratio)} × that elsewhere"
    return (
        f"{fmt.count(sinks['evaluated'])}{total} (by rule: {', '.join(rules)}), "
        f"{fmt.plain_percent(sinks['share_sq'])} of Σ‖x‖²{at_0}"
    )


def _number(key: str) -> Callable[[Part], str]:
    return lambda part: fmt.number(part.get(key))


_SCOPE_LINES: tuple[tuple[str, Callable[[Part], str]], ...] = (
    ("tokens", lambda part: fmt.count(part.get("tokens"))),
    ("EV", _number("explained_variance")),
    ("EV, SAELens", _number("saelens_explained_variance")),
    ("FVU", _number("fvu_p0")),
    ("MRE", _number("mre")),
    ("  direction part", _number("direction_error")),
    ("  length part", _number("magnitude_error")),
    ("cosine", _number("cosine")),
    ("shrinkage γ", _number("shrinkage")),
    ("norm ratio", _number("norm_ratio")),
    ("L0", _number("l0")),
    ("L1", _number("l1")),
    ("dead features", lambda part: fmt.percent(part.get("dead_fraction"))),
)


def _scopes(metrics: Mapping[str, Any]) -> WideTable:
    columns = [
        Column(heading, [read(metrics[key]) for _, read in _SCOPE_LINES])
        for key, heading in (("all", "with sinks"), ("ns", "without"), ("sinks", "sinks only"))
    ]
    return WideTable([Column("", [name for name, _ in _SCOPE_LINES])], [columns], note=_SCOPE_NOTE)


_GROUP_LINES: tuple[tuple[str, Callable[[Part], str]], ...] = (
    ("tokens", lambda part: fmt.count(part.get("rows"))),
    ("norm, min–max", lambda part: _range(part.get("norm_min"), part.get("norm_max"))),
    ("L0 mean", lambda part: fmt.number(part["l0"]["mean"])),
    ("L0 p5–p95", lambda part: _range(part["l0"]["p5"], part["l0"]["p95"])),
    ("L1 mean", lambda part: fmt.number(part["l1"]["mean"])),
    ("L1 p5–p95", lambda part: _range(part["l1"]["p5"], part["l1"]["p95"])),
    ("share of all L1", lambda part: fmt.percent(part.get("l1_share"))),
    ("share of Σ‖x̂−x‖²", lambda part: fmt.percent(part.get("loss_share"))),
    ("MRE", _number("mre")),
    ("shrinkage γ", _number("shrinkage")),
    ("features only here", lambda part: fmt.count(part.get("exclusive_features"))),
)


def _range(low: float | None, high: float | None) -> str:
    return fmt.MISSING if low is None and high is None else fmt.span(low, high)


def _groups(audit: Mapping[str, Any]) -> WideTable:
    share = fmt.plain_percent(audit["top"])
    by_norm = (("top", f"top {share}\nby norm"), ("other", "other"), ("bottom", f"bottom {share}\nby norm"))
    return WideTable(
        [Column("", [name for name, _ in _GROUP_LINES])],
        [_parts(audit["groups"], by_norm), _parts(audit["kinds"], _KINDS)],
    )


def _parts(parts: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> list[Column]:
    return [
        Column(name, [read(parts[key]) if parts[key]["rows"] else fmt.MISSING for _, read in _GROUP_LINES])
        for key, name in names
    ]


def _bins(audit: Mapping[str, Any]) -> WideTable:
    bins = list(audit["metrics"]["bins"])
    edges = audit.get("edges") or []
    limits = [
        f"{'<' if place == 0 else '≥'} {fmt.plain(edges[max(0, place - 1)])}" if edges else fmt.MISSING
        for place in range(len(bins))
    ]
    columns = [
        Column("tokens", [fmt.count(scope.get("tokens")) for scope in bins]),
        *(
            Column(heading, [fmt.number(scope.get(key)) for scope in bins])
            for heading, key in (("MRE", "mre"), ("γ", "shrinkage"), ("cosine", "cosine"), ("L0", "l0"), ("L1", "l1"))
        ),
    ]
    per_bin = (audit.get("behaviour") or {}).get("bins")
    if per_bin:
        columns.append(Column("ΔCE", [fmt.number(entry["delta_ce"]["value"]) for entry in per_bin]))
    note = "Bins: tenths of the norms without sinks."
    if per_bin:
        note += " ΔCE: nats for each token spliced, that bin's tokens only."
    return WideTable([Column("norm", limits)], [columns], title="By norm, without sinks", note=note)


def _behaviour(behaviour: Mapping[str, Any]) -> WideTable:
    lines = (
        ("clean CE", "ce_clean"),
        ("ΔCE, spliced everywhere", "delta_ce_all"),
        ("ΔCE, spliced at non-sinks", "delta_ce_ns"),
        ("KL(clean ‖ spliced)", "kl"),
        ("CE, every token zeroed", "ce_zero"),
        ("CE, every token the mean", "ce_mean"),
        ("recovered, zero ablation", "ce_recovered_zero"),
        ("recovered, mean ablation", "ce_recovered_mean"),
    )
    values = [behaviour[key] for _, key in lines]
    columns = [
        Column("value", [fmt.number(value["value"]) for value in values]),
        Column("95 % interval", [_interval(value) for value in values]),
    ]
    return WideTable(
        [Column("", [name for name, _ in lines])],
        [columns],
        title="Spliced into the model",
        note=f"Nats; {fmt.count(behaviour['tokens'])} tokens in {fmt.count(behaviour['contexts'])} contexts, which the "
        f"intervals resample.",
    )


def _interval(value: Mapping[str, Any]) -> str:
    low, high = value["low"], value["high"]
    return fmt.MISSING if low is None or high is None else f"{fmt.number(low)} to {fmt.number(high)}"
