"""Artifacts → the JSON that the page's scripts draw: rounded numbers, ready labels, no statistics."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nsae_cli.report import format as fmt
from nsae_cli.report.arms import ERRORS, behaviour, pareto_point
from nsae_cli.report.page_content import NormsContent, SaeContent
from nsae_cli.report.style import log_ticks, plain_tick
from nsae_cli.report.tables import top_norms_findings
from nsae_cli.report.top_norm_figures import binned_groups
from nsae_cli.report.train_tables import varying_options

Json = dict[str, Any]
_CURVES = ("l0_ns", "l0_all", "fvu_ns", "fvu_all")
# Lone surrogates cannot be written as UTF-8; as an escape they are still JSON.
_SURROGATE = re.compile("[\ud800-\udfff]")
_GROUPS = ("sinks", *(f"b{number}" for number in range(10)))


def rounded(value: Any, digits: int = 4) -> float | None:
    """A number with few digits, so that the page stays small; None where it is undefined."""
    if value is None or isinstance(value, (str, bool, Mapping, list)):
        return None
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else None


def fitting(items: Sequence[Json], budget: int) -> tuple[list[Json], int]:
    """The first items whose JSON fits into a number of bytes, and how many are left out."""
    kept: list[Json] = []
    for item in items:
        budget -= embedded_bytes(item) + 1
        if budget < 0:
            break
        kept.append(item)
    return kept, len(items) - len(kept)


def embedded_json(value: Any) -> str:
    """JSON without blanks that cannot end the script element it stands in, and that UTF-8 can write."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def embedded_bytes(value: Any) -> int:
    """How many bytes of the page a value takes."""
    return len(embedded_json(value).encode("utf-8"))


def norms_section(norms: NormsContent) -> Json:
    """The heat map: for every layer the share of its tokens per bin of log10 ‖x‖, all together and by position."""
    hooks = norms.document["hooks"]
    counts = np.asarray(norms.arrays["counts"], dtype=np.float64)
    edges = np.asarray(norms.arrays["edges"], dtype=np.float64)
    first = np.asarray(norms.arrays.get("position0_counts", counts * 0), dtype=np.float64)
    filled = np.flatnonzero(counts.sum(axis=0))
    low, high = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, len(edges) - 1)
    rows = np.array([hook.get("rows") or total for hook, total in zip(hooks, counts.sum(axis=1), strict=True)])
    parts = {"all": (counts, rows)}
    if first.any():
        parts |= {"rest": (counts - first, (counts - first).sum(axis=1)), "position0": (first, first.sum(axis=1))}
    span = 10.0 ** edges[[low, high]]
    return {
        "name": norms.name,
        "title": f"{fmt.model_name(norms.document.get('model'))}, {norms.document.get('site') or 'hooks'}",
        "caption": f"{fmt.count(int(rows.max()) if len(rows) else None)} tokens per layer, "
        f"{fmt.source_line(norms.document)}; activations {fmt.artifact_name(norms.document.get('activations'))}.",
        "layers": [fmt.layer_label(hook) for hook in hooks],
        "edges": [round(float(edge), 4) for edge in edges[low : high + 1]],
        "ticks": _log10_ticks(float(span[0]), float(span[1])),
        "medians": [rounded(hook.get("median")) for hook in hooks],
        "counts": {
            name: [[int(count) for count in column[low:high]] for column in part] for name, (part, _) in parts.items()
        },
        "rows": {name: [int(total) for total in totals] for name, (_, totals) in parts.items()},
        "table": [
            {
                "layer": fmt.layer_label(hook),
                "median": rounded(hook.get("median")),
                "p99": rounded(hook.get("p99")),
                "max": rounded(hook.get("max")),
                "position0": rounded(_position0_median(hook)),
                "sinks": rounded(fmt.quotient((hook.get("sinks") or {}).get("total"), hook.get("rows"))),
                "share": rounded(hook.get("sink_share_sq")),
            }
            for hook in hooks
        ],
    }


def _position0_median(hook: Mapping[str, Any]) -> float | None:
    table = hook.get("table") or {}
    cells = [table.get(key) or {} for key in ("position0_special", "position0_other")]
    return max(cells, key=lambda cell: cell.get("rows") or 0).get("median")


def _log10_ticks(low: float, high: float) -> Json:
    ticks = [tick for tick in log_ticks(low, high).tick_values(low, high) if low * 0.98 <= tick <= high * 1.02]
    return {
        "at": [round(math.log10(tick), 4) for tick in ticks],
        "text": [plain_tick(float(f"{t:.6g}")) for t in ticks],
    }


def histograms_section(sae: SaeContent) -> Json | None:
    """Per-token L0 and L1 of an SAE in three groups; None without an analysis."""
    if sae.top_norms is None:
        return None
    document, arrays = sae.top_norms
    groups = document.get("groups") or {}
    return {
        "sae": sae.name,
        "top": fmt.plain_percent(document.get("top")),
        "rows": {key: (groups.get(key) or {}).get("rows") for key in ("top", "other", "bottom")},
        "caption": f"{fmt.count(document.get('rows'))} held-out tokens of "
        f"{fmt.artifact_name(document.get('activations')) or 'unnamed activations'}, {fmt.source_line(document)}.",
        "findings": top_norms_findings(document),
        **{quantity: binned_groups(arrays, quantity) for quantity in ("l0", "l1")},
    }


def curves_section(sae: SaeContent, points: int) -> Json | None:
    """Training curves, thinned to about `points` steps, the last one kept; None where nothing was logged."""
    if not sae.curves:
        return None
    every = max(1, -(-len(sae.curves) // points))
    rows = list(sae.curves[::-1][::every])[::-1]
    return {
        "sae": sae.name,
        "tokens": [row.get("tokens") for row in rows],
        "bias": [[rounded(_ratio(row, place), 3) for row in rows] for place in range(len(_GROUPS))],
        "share": [[rounded((row.get("loss_share") or {}).get(name), 3) for row in rows] for name in _GROUPS],
        **{key: [rounded(row.get(key), 4) for row in rows] for key in _CURVES},
    }


def _ratio(row: Mapping[str, Any], place: int) -> float | None:
    values = row.get("bias_ratio")
    if isinstance(values, Mapping):
        return values.get(_GROUPS[place])
    return values[place] if values and place < len(values) else None


def pareto_section(saes: Sequence[SaeContent]) -> Json:
    """One point per SAE; an error that nothing has is not offered."""
    points = [pareto_point(sae.name, sae.run, sae.evaluation) for sae in saes]
    return {
        "errors": [[key, name] for key, name in ERRORS if any(getattr(point, key) is not None for point in points)],
        "points": [
            {
                "sae": point.sae,
                "hook": point.hook,
                "arm": point.arm,
                "l0": rounded(point.l0),
                **{key: rounded(getattr(point, key)) for key, _ in ERRORS},
            }
            for point in points
        ],
    }


def _metric(scope: str, key: str) -> Callable[[SaeContent], Any]:
    return lambda sae: ((sae.run.get("metrics") or {}).get(scope) or {}).get(key)


def _bin(place: int, key: str) -> Callable[[SaeContent], Any]:
    def read(sae: SaeContent) -> Any:
        bins = (sae.run.get("metrics") or {}).get("bins") or []
        return (bins[place] or {}).get(key) if bins else None

    return read


def _behaviour(key: str) -> Callable[[SaeContent], Any]:
    return lambda sae: behaviour(sae.evaluation, key)


#: (heading, what it means, how to read it, how to print it)
_COLUMNS: tuple[tuple[str, str, Callable[[SaeContent], Any], str], ...] = (
    ("L0 ns", "active features per non-sink token", _metric("ns", "l0"), "number"),
    ("L0 sinks", "active features per sink token", _metric("sinks", "l0"), "number"),
    ("FVU ns", "unexplained share of the variance, non-sinks", _metric("ns", "fvu_p0"), "number"),
    ("MRE ns", "mean ‖x̂−x‖²/‖x‖², non-sinks", _metric("ns", "mre"), "number"),
    ("MRE sinks", "mean ‖x̂−x‖²/‖x‖², sinks", _metric("sinks", "mre"), "number"),
    ("EV all", "explained variance, all tokens", _metric("all", "explained_variance"), "number"),
    ("EV ns", "explained variance, non-sinks", _metric("ns", "explained_variance"), "number"),
    ("γ ns", "shrinkage: 1 = none, non-sinks", _metric("ns", "shrinkage"), "number"),
    ("dead", "share of features silent on the held-out tokens", _metric("all", "dead_fraction"), "percent"),
    ("bias bin 0", "share of loss ÷ share of tokens, shortest tenth", _bin(0, "bias_ratio"), "number"),
    ("bias bin 9", "share of loss ÷ share of tokens, longest tenth", _bin(-1, "bias_ratio"), "number"),
    ("bias sinks", "share of loss ÷ share of tokens, sinks", _metric("sinks", "bias_ratio"), "number"),
    ("nbi", "slope of log relative error on log norm, non-sinks", _metric("ns", "nbi"), "number"),
    ("ΔCE ns", "nats, x̂ spliced in at non-sinks", _behaviour("delta_ce_ns"), "number"),
    ("ΔCE all", "nats, x̂ spliced in everywhere", _behaviour("delta_ce_all"), "number"),
)


def sae_table(saes: Sequence[SaeContent]) -> Json:
    """The table of SAEs: columns {label, help, kind} and rows of raw values; a column without any value is left out."""
    columns: list[Json] = [{"label": "SAE", "help": "name in the workspace", "kind": "name"}]
    cells: list[list[Any]] = [[sae.name for sae in saes]]
    hooks = [fmt.layer_of(sae.run.get("hook")) for sae in saes]
    columns.append({"label": "layer", "help": "layer of the hook that it reads", "kind": "number"})
    cells.append([sae.run.get("hook") if layer is None else layer for layer, sae in zip(hooks, saes, strict=True)])
    for label, values in varying_options([sae.run for sae in saes]):
        kind = "number" if all(isinstance(value, (int, float, type(None))) for value in values) else "text"
        columns.append({"label": label, "help": f"option of nsae train: {label}", "kind": kind})
        cells.append([rounded(value, 4) if kind == "number" else fmt.MISSING if value is None else str(value)
                      for value in values])  # fmt: skip
    for label, meaning, read, kind in _COLUMNS:
        found = [rounded(read(sae)) for sae in saes]
        if any(value is not None for value in found):
            columns.append({"label": label, "help": meaning, "kind": kind})
            cells.append(found)
    return {"columns": columns, "rows": [list(row) for row in zip(*cells, strict=True)]}
