"""One self-contained HTML page: style, scripts, plotly.js and data in one file that fetches nothing."""

from __future__ import annotations

import html
import re
from functools import cache
from importlib import resources
from typing import Any

from nsae_cli import __version__
from nsae_cli.report import page_sections as sections
from nsae_cli.report.page_comparison import comparison_section
from nsae_cli.report.page_content import ReportContent
from nsae_cli.report.page_features import features_section
from nsae_cli.report.summary import summarise

#: A page is never larger.
LARGEST_PAGE = 8_000_000
#: Shares of what plotly.js leaves: training curves, histograms; the feature browser takes what is left over.
_CURVES_BYTES, _HISTOGRAM_BYTES = 500_000, 350_000
#: Steps per training curve, tried from the largest.
_CURVE_POINTS = (120, 60, 30)
_PARTS = ("style.css", "base.js", "tables.js", "plots.js", "features.js", "main.js")
_PLACE = re.compile(r"@@([a-z_]+)@@")


def render_page(content: ReportContent) -> tuple[str, dict[str, int]]:
    """The page's HTML, at most `LARGEST_PAGE` bytes as UTF-8, and what had to be left out of it.

    Data stand in one JSON element that a script reads: no text of an artifact becomes markup.
    """
    from plotly.offline import get_plotlyjs

    data = _data(content)
    fixed = {
        "title": html.escape(content.title),
        "style": _part("style.css"),
        "plotly": get_plotlyjs(),
        "script": "\n".join(_part(name) for name in _PARTS if name.endswith(".js")),
    }
    frame = sum(len(text.encode("utf-8")) for text in fixed.values()) + len(_part("template.html").encode("utf-8"))
    budget = LARGEST_PAGE - frame - sections.embedded_bytes(data)
    left_out = dict(data["left_out"])
    for number, features in enumerate(content.features):
        section = features_section(features, max(0, budget // (len(content.features) - number)))
        budget -= sections.embedded_bytes(section) + 1
        data["features"].append(section)
        left_out["features"] = left_out.get("features", 0) + section["left_out"]
    parts = {**fixed, "data": sections.embedded_json(data)}
    return _PLACE.sub(lambda found: parts[found[1]], _part("template.html")), left_out


def _data(content: ReportContent) -> dict[str, Any]:
    histograms = [found for sae in content.saes if (found := sections.histograms_section(sae))]
    histograms, fewer_histograms = sections.fitting(histograms, _HISTOGRAM_BYTES)
    for points in _CURVE_POINTS:
        curves = [found for sae in content.saes if (found := sections.curves_section(sae, points))]
        curves, fewer_curves = sections.fitting(curves, _CURVES_BYTES)
        if not fewer_curves:
            break
    tables = [found for name, table in content.tables if (found := comparison_section(name, table))]
    return {
        "title": content.title,
        "version": __version__,
        "summary": summarise(content),
        "missing": list(content.missing),
        "norms": [sections.norms_section(norms) for norms in content.norms],
        "histograms": histograms,
        "curves": curves,
        "pareto": sections.pareto_section(content.saes),
        "saes": sections.sae_table(content.saes) if content.saes else None,
        "tables": tables,
        "features": [],
        "left_out": {"histograms": fewer_histograms, "curves": fewer_curves},
    }


@cache
def _part(name: str) -> str:
    return (resources.files("nsae_cli.report") / "page" / name).read_text(encoding="utf-8")
