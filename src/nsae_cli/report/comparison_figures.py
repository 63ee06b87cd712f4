"""Comparisons as figures: fronts of sparsity against error, and paired differences with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from nsae_cli.report import comparison_text as text
from nsae_cli.report import format as fmt
from nsae_cli.report.style import (
    DASHES,
    FAINT,
    GREEN,
    GREY,
    INK,
    SERIES,
    VERMILION,
    add_header,
    house_style,
    log_ticks,
    new_figure,
    plain_tick,
)

_FRONTS = (("fvu_p0_ns", "FVU ns"), ("mre_ns", "MRE ns"), ("delta_ce_ns", "ΔCE ns (nats)"))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MARK_COLOURS = {"better": GREEN, "worse": VERMILION, "equivalent": INK, "undecided": GREY}
_MARK_SHAPES = {"better": "v", "worse": "^", "equivalent": "s", "undecided": "o"}


def comparison_fronts(document: Mapping[str, Any]) -> Figure:
    """Non-sink L0 against FVU, MRE and ΔCE: a row of panels per group, a line per arm, a faint point per SAE.

    Groups of altered stores come last. Panels without any value are left out, and so are groups in which no arm has two
    levels of sparsity, unless there are no others.
    """
    groups = [group for group in document["groups"] if _has_fronts(group)] or document["groups"]
    metrics = [(name, label) for name, label in _FRONTS if any(_points(row, name) for g in groups for row in g["rows"])]
    metrics = metrics or [_FRONTS[0]]
    arms = list(dict.fromkeys(row["arm"] for group in groups for row in group["rows"]))
    with house_style():
        width = max(3.4 * len(metrics) + 0.6, 5.5)
        columns = max(1, int((width - 0.3) / (0.065 * max(map(len, arms)) + 0.55)))
        legend_lines = -(-len(arms) // columns)
        figure = new_figure(width, 2.7 * len(groups) + 1.0 + 0.22 * legend_lines)
        panels: np.ndarray = figure.subplots(len(groups), len(metrics), squeeze=False)
        for place, group in enumerate(groups):
            for column, (metric, label) in enumerate(metrics):
                axes = panels[place, column]
                _draw_front(axes, group, metric, arms)
                axes.set_ylabel(label)
                if place == len(groups) - 1:
                    axes.set_xlabel("L0 of non-sink tokens")
                if column == 0:
                    axes.set_title(group["label"], loc="left")
        handles = [Line2D([], [], label=arm, markersize=5, **_look(arms, arm)) for arm in arms]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4)
        caption = "Down and to the left is better. Large points: mean over seeds; small: each SAE. Held-out tokens."
        add_header(figure, f"{document['name']}: error against sparsity", caption)
    return figure


def _has_fronts(group: Mapping[str, Any]) -> bool:
    arms = [row["arm"] for row in group["rows"]]
    return len(set(arms)) < len(arms)


def _look(arms: Sequence[str], arm: str) -> dict[str, Any]:
    place = arms.index(arm)
    again = place // len(SERIES)
    return {
        "color": SERIES[place % len(SERIES)],
        "marker": _MARKERS[(place + again) % len(_MARKERS)],
        "linestyle": DASHES[again % len(DASHES)],
        "linewidth": 1.3,
    }


def _points(row: Mapping[str, Any], metric: str) -> list[tuple[float, float]]:
    """(L0, metric) of each seed that has both."""
    l0, values = row["metrics"]["l0_ns"]["by_seed"], row["metrics"][metric]["by_seed"]
    both = [(l0[seed], values[seed]) for seed in l0]
    return [(x, y) for x, y in both if x is not None and y is not None and x > 0]


def _draw_front(axes: Axes, group: Mapping[str, Any], metric: str, arms: Sequence[str]) -> None:
    every: list[tuple[float, float]] = []
    for arm in arms:
        rows = [points for row in group["rows"] if row["arm"] == arm and (points := _points(row, metric))]
        if not rows:
            continue
        look = _look(arms, arm)
        single = np.array([point for points in rows for point in points])
        means = np.array(sorted(tuple(np.mean(points, axis=0)) for points in rows))
        axes.plot(*single.T, linestyle="none", marker=look["marker"], markersize=2.2, color=look["color"], alpha=0.5)
        axes.plot(*means.T, markersize=4.5, markeredgecolor="white", markeredgewidth=0.5, **look)
        every += [tuple(point) for point in single]
    if not every:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    x, y = np.array(every).T
    _log_axis(axes, "x", x)
    if y.min() > 0:
        _log_axis(axes, "y", y)


def _log_axis(axes: Axes, which: str, values: np.ndarray) -> None:
    """A log axis with plain labels where values span more than a factor of 1.5, else a linear one."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if values.max() / values.min() > 1.5:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        few = values.max() / values.min() < 4  # what log_ticks offers would leave one label or two
        subs = (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
        axis.set_major_locator(LogLocator(subs=subs) if few else log_ticks(values.min(), values.max()))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(plain_tick))


_SHOWN = (("fvu_p0_ns", "FVU ns, %"), ("mre_ns", "MRE ns, %"), ("delta_ce_ns", "ΔCE ns, nats"))


def comparison_differences(group: Mapping[str, Any], options: Mapping[str, Any]) -> Figure:
    """Paired differences of every arm of a group, a panel per metric: intervals over seeds and over contexts.

    The margin of equivalence is shaded. A comparison that was not made says why in place of its intervals.
    """
    lines = [(row, compared) for row in group["rows"] for compared in row["comparisons"]]
    metrics = [(name, label) for name, label in _SHOWN if any(compared["metrics"].get(name) for _, compared in lines)]
    metrics = metrics or [_SHOWN[0]]
    with house_style():
        longest = max(len(_name(*line)) for line in lines)
        figure = new_figure(max(0.065 * longest + 0.3 + 2.5 * len(metrics), 7.0), 2.1 + 0.27 * len(lines))
        panels: np.ndarray = figure.subplots(1, len(metrics), squeeze=False, sharey=True)
        for axes, (metric, label) in zip(panels[0], metrics, strict=True):
            margin = options["ce_margin"] if metric.startswith("delta_ce") else 100 * options["fvu_margin"]
            axes.axvspan(-margin, margin, color=GREY, alpha=0.3, linewidth=0)
            axes.axvline(0, color=FAINT, linewidth=0.8)
            for place, (_, compared) in enumerate(lines):
                _draw_difference(axes, place, compared, metric)
            axes.set_xlabel(f"difference in {label}")
            axes.xaxis.set_major_formatter(FuncFormatter(_signed_tick))
            axes.margins(x=0.12)
        first = panels[0, 0]
        first.set_yticks(range(len(lines)), [_name(row, compared) for row, compared in lines])
        first.set_ylim(len(lines) - 0.4, -0.6)
        levels = [row["level"] for row, _ in lines]
        for axes in panels[0]:
            axes.tick_params(axis="y", length=0)
            for place in range(1, len(lines)):
                if levels[place] != levels[place - 1]:
                    axes.axhline(place - 0.5, color=GREY, linewidth=0.7)
        handles = [
            Line2D([], [], color=colour, marker=_MARK_SHAPES[mark], markersize=5, linestyle="none", label=mark)
            for mark, colour in _MARK_COLOURS.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        caption = (
            "Thick: 95 % interval over seeds (t); thin, below it: over held-out contexts (bootstrap). Shaded: the "
            "margin of equivalence. Compared at matched non-sink L0 only; to the left is better."
        )
        add_header(figure, f"{group['label']}: paired differences", f"{caption} {fmt.source_line(group)}.")
    return figure


def _name(row: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    return f"{row['arm']} − {compared['with']}, L0 {row['level']}"


def _draw_difference(axes: Axes, place: int, compared: Mapping[str, Any], metric: str) -> None:
    if compared["status"] != "matched":
        axes.text(
            0.5, place, text.unmatched(compared), transform=axes.get_yaxis_transform(), ha="center", va="center",
            size=7, color=FAINT, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        return
    entry = compared["metrics"].get(metric)
    if entry is None:
        return
    scale = text.in_percent(metric, entry) or 1.0
    colour = _MARK_COLOURS[entry["mark"]]
    seeds, contexts = entry["t_interval"], (entry["bootstrap"] or {}).get("interval")
    if contexts is not None:
        axes.plot([scale * contexts["low"], scale * contexts["high"]], [place + 0.22] * 2, color=colour, linewidth=1)
    if seeds is not None:
        axes.plot([scale * seeds["low"], scale * seeds["high"]], [place] * 2, color=colour, linewidth=2.6, alpha=0.8,
                  solid_capstyle="butt")  # fmt: skip
    axes.plot(
        scale * entry["difference"], place, marker=_MARK_SHAPES[entry["mark"]], color=colour, markersize=5,
        markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


def _signed_tick(value: float, _position: int | None = None) -> str:
    return "0" if value == 0 else f"{value:+.4g}".replace("-", "−")
