"""top_norms.json as terminal tables and as sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

_KINDS = (("position0", "position 0"), ("special", "other special"), ("ordinary", "ordinary"))
Part = Mapping[str, Any]


def _spread(key: str, *inner: str) -> Callable[[Part], str]:
    def read(part: Part) -> str:
        values = part.get(key) or {}
        return (
            fmt.number(values.get(inner[0])) if len(inner) == 1 else _range(values.get(inner[0]), values.get(inner[1]))
        )

    return read


def _range(low: float | None, high: float | None) -> str:
    return fmt.MISSING if low is None and high is None else fmt.span(low, high)


def _plain(key: str, form: Callable[[Any], str] = fmt.number) -> Callable[[Part], str]:
    return lambda part: form(part.get(key))


#: (name, how to read it from a group); the rules mark where a new thought begins.
_LINES: tuple[tuple[str, Callable[[Part], str]] | None, ...] = (
    ("tokens", _plain("rows", fmt.count)),
    ("norm, min–max", lambda part: _range(part.get("norm_min"), part.get("norm_max"))),
    None,
    ("L0 mean", _spread("l0", "mean")),
    ("L0 median", lambda part: fmt.plain((part.get("l0") or {}).get("median"))),
    ("L0 p5–p95", _spread("l0", "p5", "p95")),
    ("L1 mean", _spread("l1", "mean")),
    ("L1 p5–p95", _spread("l1", "p5", "p95")),
    ("share of all L1", _plain("l1_share", fmt.percent)),
    ("share of the loss", _plain("loss_share", fmt.percent)),
    None,
    ("MRE", _plain("mre")),
    ("  direction part", _plain("direction_error")),
    ("  length part", _plain("magnitude_error")),
    ("shrinkage γ", _plain("shrinkage")),
    ("norm ratio", _plain("norm_ratio")),
    ("features only here", _plain("exclusive_features", fmt.count)),
)
#: The quantities that several SAEs are compared in.
_COMPARED = frozenset(
    ("tokens", "norm, min–max", "L0 mean", "L1 mean", "share of all L1", "share of the loss", "MRE", "shrinkage γ",
     "norm ratio", "features only here")
)  # fmt: skip
_NOTE = (
    "L0: active features per token; L1: sum of activations; MRE: mean ‖x̂−x‖²/‖x‖² = direction + length part; "
    "share of the loss: of the summed error term. γ = 1: no shrinkage. norm ratio: Σ‖x̂‖/Σ‖x‖."
)


def top_norms_table(
    reports: Sequence[Mapping[str, Any]],
    labels: Sequence[str] | None = None,
    source: Mapping[str, Any] | None = None,
) -> RenderableType:
    """Groups (top, other, bottom by norm) and kinds (position 0, special, ordinary) of one or several SAEs.

    One SAE: a column per group. Several: a column per SAE, the groups below each other.

    Args:
        reports: top_norms.json of each SAE.
        labels: a name for each; by default the SAE names without their common beginning.
        source: where `context_size`, `packing`, `bos` of the activations are to be found (manifest or norms.json).
    """
    if not reports:
        return Text("no SAE")
    names = list(labels) if labels is not None else fmt.short_labels([_sae(report) for report in reports])
    first = reports[0]
    heading = _heading(reports, source)
    if len(reports) == 1:
        groups, kinds = (
            [Column(name.replace(" by norm", ""), _cells(part)) for name, part in parts]
            for parts in (_groups(first), _kinds(first))
        )
        rules, lines = _line_names()
        tables: list[RenderableType] = [
            heading,
            Text(""),
            WideTable([Column("by norm", lines)], [groups], sections=rules),
            Text(""),
            WideTable([Column("by kind", lines)], [kinds], sections=rules),
        ]
        tokens = _frequent(first)
        return Group(*tables, Text(_NOTE, style="dim"), *([Text(""), tokens] if tokens else []))
    by_norm = _side_by_side(
        reports, names, [name.replace(" by norm", "") for name, _ in _groups(first)], _groups, "norm"
    )
    by_kind = _side_by_side(reports, names, [name for name, _ in _kinds(first)], _kinds, "kind")
    return Group(heading, Text(""), by_norm, Text(""), by_kind, Text(_NOTE, style="dim"))


def _side_by_side(
    reports: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    rows: Sequence[str],
    parts: Callable[[Mapping[str, Any]], list[tuple[str, Part]]],
    by: str,
) -> RenderableType:
    """A column per SAE; per quantity one line for each part, so that parts and SAEs can both be compared."""
    found = [[part for _, part in parts(report)] for report in reports]
    kept = [place for place in range(len(rows)) if any(one[place].get("rows") for one in found)]
    absent = [rows[place] for place in range(len(rows)) if place not in kept]
    lines = [line for line in _LINES if line is not None and line[0] in _COMPARED]
    what = [line[0] if place == kept[0] else "" for line in lines for place in kept]
    who = [rows[place] for _ in lines for place in kept]
    columns = [
        [Column(fmt.folded(name, 14), [line[1](one[place]) if one[place].get("rows") else fmt.MISSING
                                       for line in lines for place in kept])]
        for name, one in zip(names, found, strict=True)
    ]  # fmt: skip
    note = f"No token: {', '.join(absent)}." if absent else ""
    return WideTable([Column(f"by {by}", what), Column("", who)], columns, note=note)


def _sae(report: Mapping[str, Any]) -> str:
    return fmt.artifact_name(report.get("sae")) or "unnamed SAE"


def _groups(report: Mapping[str, Any]) -> list[tuple[str, Part]]:
    share = fmt.plain_percent(report.get("top"))
    groups = report.get("groups") or {}
    named = (("top", f"top {share} by norm"), ("other", "other"), ("bottom", f"bottom {share} by norm"))
    return [(name, groups.get(key) or {}) for key, name in named]


def _kinds(report: Mapping[str, Any]) -> list[tuple[str, Part]]:
    kinds = report.get("kinds") or {}
    return [(name, kinds.get(key) or {}) for key, name in _KINDS]


def _cells(part: Part) -> list[str]:
    if part.get("rows") == 0:
        return ["0", *[fmt.MISSING for line in _LINES[1:] if line is not None]]
    return [line[1](part) for line in _LINES if line is not None]


def _line_names() -> tuple[frozenset[int], list[str]]:
    rules: list[int] = []
    names: list[str] = []
    for line in _LINES:
        if line is None:
            rules.append(len(names) - 1)
        else:
            names.append(line[0])
    return frozenset(rules), names


def _heading(reports: Sequence[Mapping[str, Any]], source: Mapping[str, Any] | None) -> Text:
    first = reports[0]
    title = f"High-norm tokens in {_sae(first) if len(reports) == 1 else f'{len(reports)} SAEs'}"
    named = [name for report in reports if (name := fmt.artifact_name(report.get("activations")))]
    stores = list(dict.fromkeys(named))
    rows = sorted({report["rows"] for report in reports if report.get("rows") is not None})
    tokens = "–".join(fmt.count(value) for value in dict.fromkeys((rows[0], rows[-1]))) if rows else fmt.MISSING
    line = f"{tokens} held-out tokens of {', '.join(stores) or 'unnamed activations'}"
    return Text.assemble((title, "bold"), "\n", (f"{line}\n{fmt.source_line(fmt.merged_source(first, source))}", "dim"))


def _frequent(report: Mapping[str, Any]) -> Text | None:
    lines = []
    for name, part in _groups(report):
        tokens = [
            f"{fmt.token(one.get('text'))} {fmt.count(one.get('count'))}" for one in (part.get("tokens") or [])[:5]
        ]
        places = [
            f"{one.get('position')} ({fmt.count(one.get('count'))})"
            for one in (part.get("positions") or [])[:5]
            if one.get("count")
        ]
        if tokens:
            lines.append(f"{name}, tokens: {'  '.join(tokens)}")
        if places:
            lines.append(f"{name}, positions: {'  '.join(places)}")
    return Text.assemble(("Most frequent", "bold"), "\n", "\n".join(lines)) if lines else None


def top_norms_findings(report: Mapping[str, Any]) -> list[str]:
    """Who the top tokens are, what they cost, how well they are reconstructed: one sentence each, in numbers.

    A sentence whose values are missing is left out; no sentence claims a direction that the numbers do not show.
    """
    groups = report.get("groups") or {}
    top, other, bottom = (groups.get(key) or {} for key in ("top", "other", "bottom"))
    if not top.get("rows"):
        return ["There is no token in the top group."]
    share = fmt.plain_percent(report.get("top"))
    error = _direction if _of_cosine(report) else _error
    sentences = [_who(report, top, share), _cost(report, top, other), error(top, other, bottom, share)]
    return [sentence for sentence in sentences if sentence]


def _who(report: Mapping[str, Any], top: Part, share: str) -> str:
    rows = top["rows"]
    norms = _range(top.get("norm_min"), top.get("norm_max"))
    about = f"{fmt.count(rows)} token{'' if rows == 1 else 's'}{'' if norms == fmt.MISSING else f', norm {norms}'}"
    positions = top.get("positions")
    if not positions:
        where = "have no recorded positions"
    else:
        first = next((one["count"] for one in positions if one.get("position") == 0), None)
        everywhere = ((report.get("kinds") or {}).get("position0") or {}).get("rows")
        if first:
            where = f"are {fmt.plain_percent(first / rows)} position 0"
        elif first == 0 or everywhere == 0 or sum(one["count"] for one in positions) >= rows:
            where = "are never at position 0"
        else:
            where = "do not have position 0 among their most frequent positions"
    tokens = top.get("tokens") or []
    what = ""
    if tokens:
        best = max(tokens, key=lambda one: one["count"])
        what = (
            f"; their most frequent token is {fmt.token(best.get('text'))} ({fmt.plain_percent(best['count'] / rows)})"
        )
    return f"The top {share} by norm ({about}) {where}{what}."


def _cost(report: Mapping[str, Any], top: Part, other: Part) -> str:
    error_loss = "the cosine loss" if _of_cosine(report) else "the squared-error loss"
    shares = [
        f"{fmt.plain_percent(top[key])} of {what}"
        for key, what in (("l1_share", "all L1"), ("loss_share", error_loss))
        if top.get(key) is not None
    ]
    sentences = []
    if shares:
        of_tokens = fmt.quotient(top.get("rows"), report.get("rows"))
        are = "" if of_tokens is None else f"are {fmt.plain_percent(of_tokens)} of the tokens and "
        sentences.append(f"they {are}hold {' and '.join(shares)}")
    mine, theirs = ((part.get("l0") or {}).get("mean") for part in (top, other))
    if mine is not None:
        ratio = fmt.quotient(mine, theirs)
        against = "" if ratio is None else f", {_against(ratio)} the others' {fmt.plain(theirs)}"
        sentences.append(f"they activate {fmt.plain(mine)} features per token (L0){against}")
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _of_cosine(report: Mapping[str, Any]) -> bool:
    """Whether the SAE was trained on directions alone: how long its reconstructions are means nothing then."""
    return (report.get("config") or {}).get("l2_norm") == "cosine"


def _direction(top: Part, other: Part, bottom: Part, share: str) -> str:
    if top.get("direction_error") is None:
        return ""
    against = [
        f"{fmt.plain(part['direction_error'])} for {whom}"
        for part, whom in ((other, "the others"), (bottom, f"the bottom {share}"))
        if part.get("direction_error") is not None
    ]
    text = f"Their direction error is {fmt.plain(top['direction_error'])}"
    text += f"{', against ' if against else ''}{' and '.join(against)}"
    return f"{text}; how long a reconstruction is was not trained (--l2-norm cosine)."


def _error(top: Part, other: Part, bottom: Part, share: str) -> str:
    mine, theirs, low = top.get("mre"), other.get("mre"), bottom.get("mre")
    if mine is None:
        return ""
    against = [
        f"{fmt.plain(value)} for {whom}"
        for value, whom in ((theirs, "the others"), (low, f"the bottom {share}"))
        if value is not None
    ]
    text = f"Their relative error (MRE) is {fmt.plain(mine)}{', against ' if against else ''}{' and '.join(against)}"
    length = top.get("norm_ratio")
    if mine >= 0.9 and length is not None and length <= 0.1:
        return (
            f"{text}: the SAE has given them up, their reconstruction has {fmt.plain_percent(length)} of their length."
        )
    ratio = fmt.quotient(mine, theirs)
    if ratio is not None and 0.9 <= ratio <= 1 / 0.9:
        text += ": for their size they are reconstructed about as well as the others"
    elif ratio is not None:
        text += f": for their size they are reconstructed {'better' if ratio < 1 else 'worse'} than the others"
    part = fmt.quotient(top.get("magnitude_error"), mine)
    if part is not None and top.get("direction_error") is not None and 0 <= part <= 1:
        text += f"; {fmt.plain_percent(part)} of their error is length, the rest direction"
    return text + "."


def _against(ratio: float) -> str:
    return "about the same as" if 0.9 <= ratio <= 1 / 0.9 else f"{fmt.plain(ratio, 2)} ×"
