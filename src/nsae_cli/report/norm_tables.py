"""norms.json as terminal tables: norms per layer, who the large norms are, and what they would do to a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

_CELLS = (
    ("position0_special", "position 0", "special"),
    ("position0_other", "position 0", "other token"),
    ("other_special", "elsewhere", "special"),
    ("other", "elsewhere", "other token"),
)


def norms_table(norms: Mapping[str, Any]) -> RenderableType:
    """Norms and sinks per layer, the 2×2 of position 0 × special token, top tokens, pre-flight, probe.

    Args:
        norms: norms.json. `alpha_eff` of a hook is read as {act: {l2-norm: {sinks, bins[10]}}} (one level less, or a
            list of eleven values sinks, b0…b9, is understood too), `esf` as {l2-norm: {all, ns}} or {l2-norm: value}.
    """
    hooks = norms["hooks"]
    parts: list[RenderableType] = [_heading(norms), Text(""), _norms(hooks), Text(""), _two_by_two(norms)]
    for part in (_disagreement(hooks), _top_tokens(hooks), _pre_flight(hooks), _probe(hooks)):
        if part is not None:
            parts += [Text(""), part]
    return Group(*parts)


def _heading(norms: Mapping[str, Any]) -> Text:
    rows = sorted({hook["rows"] for hook in norms["hooks"] if hook.get("rows") is not None})
    title = f"Norms of {fmt.model_name(norms.get('model'))}, {norms.get('site') or 'site not recorded'}"
    name = fmt.artifact_name(norms.get("activations")) or fmt.MISSING
    lines = [f"activations {name}, {fmt.count(rows[-1] if rows else None)} tokens"]
    lines.append(fmt.source_line(norms))
    return Text.assemble((title, "bold"), "\n", ("\n".join(lines), "dim"))


def _layers(hooks: Sequence[Mapping[str, Any]]) -> Column:
    return Column("layer", [fmt.layer_label(hook) for hook in hooks])


def _column(heading: str, hooks: Sequence[Mapping[str, Any]], key: str) -> Column:
    return Column(heading, [fmt.number(hook.get(key)) for hook in hooks])


def _norms(hooks: Sequence[Mapping[str, Any]]) -> WideTable:
    sinks = [hook.get("sinks") or {} for hook in hooks]
    rules = [
        Column(heading, [fmt.count(found.get(key)) for found in sinks])
        for key, heading in (
            ("total", "\nsinks"),
            ("position", "by rule:\nposition"),
            ("norm", "\nnorm"),
            ("massive", "\nmassive"),
        )
    ]
    share = Column("sinks'\nΣ‖x‖²", [fmt.percent(hook.get("sink_share_sq")) for hook in hooks])
    note = (
        "CV = standard deviation ÷ mean; ns = without sinks. Sinks are tokens caught by any rule: position (position "
        "0, where its median norm exceeds 3 × the median elsewhere), norm (above 10 × the layer's median), massive "
        "(one coordinate above 100 and 1000 × its row's median). Σ‖x‖²: the share of the squared norms that sinks hold."
    )
    return WideTable(
        [_layers(hooks)],
        [
            [_column("median\n‖x‖", hooks, "median"), _column("\np1", hooks, "p1"), _column("\np99", hooks, "p99"),
             _column("\nmax", hooks, "max")],
            [_column("\nCV", hooks, "cv"), _column("CV\nns", hooks, "cv_ns")],
            [*rules, share],
        ],
        title="Norms and sinks per layer",
        note=note,
    )  # fmt: skip


def _two_by_two(norms: Mapping[str, Any]) -> RenderableType:
    hooks = norms["hooks"]
    tables = [hook.get("table") for hook in hooks]
    title = "Position 0 × special token"
    if not any(tables):
        return Text.assemble(
            (title, "bold"), "\n", ("not available: the activations have no positions or tokens", "dim")
        )
    groups, empty = [], []
    for key, place, kind in _CELLS:
        cells = [(table or {}).get(key) or {} for table in tables]
        rows = {cell.get("rows") for cell in cells if cell.get("rows") is not None}
        name = f"{place} × {kind}"
        if rows == {0}:
            empty.append(name)
            continue
        columns = (
            [] if len(rows) == 1 else [Column(f"{place}\n{kind}\nrows", [fmt.count(c.get("rows")) for c in cells])]
        )
        top = f"{fmt.count(rows.pop())} rows" if len(rows) == 1 else ""
        columns.append(Column(f"{place}\n{kind}\n{top}\nmedian", [fmt.number(cell.get("median")) for cell in cells]))
        columns.append(Column("max", [fmt.number(cell.get("max")) for cell in cells]))
        groups.append(columns)
    notes = [f"No token in: {', '.join(empty)}."] if empty else []
    if "position 0 × other token" in empty and norms.get("bos"):
        notes.append("Every context begins with the BOS token, so position and token cannot be told apart here.")
    return WideTable([_layers(hooks)], groups, title=f"{title} (norm)", note="\n".join(notes))


def _top_tokens(hooks: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    lines = []
    for hook in hooks:
        tokens = hook.get("top_tokens") or []
        lines.append("  ".join(f"{fmt.token(one.get('text'))} {fmt.count(one.get('count'))}" for one in tokens))
    return _by_layer("Most frequent tokens among the highest norms", hooks, lines)


def _disagreement(hooks: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    """Rows that some but not all judged rules caught."""
    lines = []
    for hook in hooks:
        sets = (hook.get("sinks") or {}).get("overlap")
        sets = sets if isinstance(sets, Mapping) else {}
        widest = max((len(rules.split("+")) for rules in sets), default=0)
        lines.append("  ".join(
            f"{rules.replace('+', ' and ')} only {fmt.count(rows)}"
            for rules, rows in sets.items() if rows and len(rules.split("+")) < widest
        ))  # fmt: skip
    return _by_layer("Tokens on which the sink rules disagree", hooks, lines)


_PROBE_TITLE = "Probe: the first token and the first positional embedding exchanged"
_VERDICTS = {"position": "the position", "token": "the token", "both": "both", "neither": "neither", None: "no sink"}
_CONDITIONS = (
    ("as_is", "as it is"), ("bos", "BOS token\nfirst"), ("other_token", "other\ntoken"),
    ("other_position", "other\nposition"),
)  # fmt: skip


def _probe(hooks: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    probed = [hook for hook in hooks if hook.get("probe")]
    if probed and all(isinstance(hook["probe"], Mapping) and "as_is" in hook["probe"] for hook in probed):
        probes = [hook["probe"] for hook in probed]
        ratios = [
            Column(heading, [fmt.number((probe.get(key) or {}).get("ratio")) for probe in probes])
            for key, heading in _CONDITIONS
        ]
        verdict = Column(
            "the sink\nneeds", [_VERDICTS.get(one.get("verdict"), str(one.get("verdict"))) for one in probes]
        )
        note = (
            "Median norm at position 0 ÷ median elsewhere: with the contexts as they are, with another first token, "
            "and with another position's embedding at position 0. A sink needs what cannot be exchanged without "
            "losing it."
        )
        return WideTable([_layers(probed)], [ratios, [verdict]], title=_PROBE_TITLE, note=note)
    lines = []
    for hook in hooks:
        probe = hook.get("probe")
        values = (
            [text for key, value in probe.items() for text in _flat(key, value)] if isinstance(probe, Mapping) else []
        )
        lines.append(" · ".join(values) if values else str(probe or ""))
    return _by_layer(_PROBE_TITLE, hooks, lines)


def _flat(key: str, value: Any) -> list[str]:
    """`key value` pairs of a nested mapping, as words."""
    name = key.replace("_", " ")
    if isinstance(value, Mapping):
        return [f"{name} {text}" for inner, deeper in value.items() for text in _flat(inner, deeper)]
    if isinstance(value, (bool, str)):
        return [f"{name}: {'yes' if value is True else 'no' if value is False else value}"]
    if isinstance(value, Sequence):
        return [f"{name} {', '.join(fmt.number(one) if not isinstance(one, str) else one for one in value)}"]
    return [f"{name} {fmt.number(value)}"]


def _by_layer(title: str, hooks: Sequence[Mapping[str, Any]], lines: Sequence[str]) -> RenderableType | None:
    """One line per layer; neighbours that read the same share one. None where every line is empty."""
    merged: list[tuple[str, str, str]] = []
    for hook, line in zip(hooks, lines, strict=True):
        label = fmt.layer_label(hook)
        if merged and merged[-1][2] == line:
            merged[-1] = (merged[-1][0], label, line)
        else:
            merged.append((label, label, line))
    shown = [(first if first == last else f"{first}–{last}", line) for first, last, line in merged if line]
    if not shown:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in shown:
        table.add_row(Text(f"layer {label}" if label[0].isdigit() else label), Text(line))
    return Group(Text(title, style="bold"), table)


def _pre_flight(hooks: Sequence[Mapping[str, Any]]) -> RenderableType | None:
    """Relative sparsity weight of sinks and of the highest bin for each loss, and the effective batch fraction."""
    weights = [_weights(hook.get("alpha_eff")) for hook in hooks]
    fractions = [defaultdict(dict, _fractions(hook.get("esf"))) for hook in hooks]
    parts: list[RenderableType] = []
    losses = list(dict.fromkeys(name for one in weights for name in one))
    if losses:
        groups = []
        for loss in losses:
            found = [one.get(loss, (None, None)) for one in weights]
            groups.append([
                Column(f"{fmt.folded(loss, 15)}\nbin 9", [fmt.number(highest) for highest, _ in found]),
                Column("sinks", [fmt.number(sinks) for _, sinks in found]),
            ])  # fmt: skip
        parts.append(WideTable(
            [_layers(hooks)], groups, title="Before training: sparsity weight ÷ error weight, non-sink tokens = 1",
            note="Above 1: shrunk more than ordinary tokens; below 1: less. bin 9: highest tenth of non-sink norms.",
        ))  # fmt: skip
    names = list(dict.fromkeys(name for one in fractions for name in one))
    if names:
        groups = []
        for name in names:
            scopes = list(dict.fromkeys(scope for one in fractions for scope in one[name]))
            groups.append([
                Column(f"{'' if place else name}\n{scope}", [fmt.percent(one[name].get(scope)) for one in fractions])
                for place, scope in enumerate(scopes)
            ])  # fmt: skip
        if parts:
            parts.append(Text(""))
        parts.append(WideTable(
            [_layers(hooks)], groups, title="Before training: share of a batch that the loss hears, by --l2-norm",
            note="(Σa)² ÷ (N Σa²) with a = each token's weighted squared error at x̂ = 0; 100 % = all tokens alike.",
        ))  # fmt: skip
    return Group(*parts) if parts else None


def _weights(value: Any, name: str = "") -> dict[str, tuple[float | None, float | None]]:
    """loss → (highest bin, sinks), whatever the depth at which the values stand."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and not {"sinks", "bins", "b9"} & set(value):
        found = {}
        for key, inner in value.items():
            found.update(_weights(inner, f"{name} {key}".strip()))
        return found
    return {_loss_name(name) or "weight": _ends(value)}


def _ends(value: Any) -> tuple[float | None, float | None]:
    if isinstance(value, Mapping):
        bins = value.get("bins") or [value.get("b9")]
        return bins[-1], value.get("sinks")
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        # Eleven values: the sinks, then the bins from the lowest norms to the highest.
        return (value[-1], value[0]) if len(value) == 11 else (value[-1], None)
    return None, value


def _fractions(value: Any) -> dict[str, Mapping[str, float | None]]:
    """l2-norm → {all, ns}."""
    if value is None:
        return {}
    named = value if isinstance(value, Mapping) else {"": value}
    return {_loss_name(str(key)): one if isinstance(one, Mapping) else {"all": one} for key, one in named.items()}


def _loss_name(name: str) -> str:
    return name.replace("_", " ")
