"""Sparsity against error: one point per SAE, a line per method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nsae_cli.report import format as fmt
from nsae_cli.report.arms import ERRORS, ParetoPoint, by_arm
from nsae_cli.report.style import DASHES, SERIES, add_header, house_style, log_ticks, new_figure, plain_tick

_MARKERS = ("o", "s", "D", "^", "P", "X", "*")


def pareto_figure(points: Sequence[ParetoPoint], caption: str = "") -> Figure:
    """L0 of non-sinks (log) against each error that was measured: a column per error, a row per hook.

    Args:
        points: one per SAE; those without L0 or an error are not drawn there.
        caption: where the SAEs come from.
    """
    hooks = sorted({point.hook for point in points})
    errors = [(key, name) for key, name in ERRORS if any(getattr(point, key) is not None for point in points)]
    if not hooks or not errors:
        raise ValueError("pareto_figure needs SAEs with an error")
    arms = sorted({point.arm for point in points})
    look = {
        arm: {
            "color": SERIES[place % len(SERIES)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": DASHES[(place // len(SERIES)) % len(DASHES)],
        }
        for place, arm in enumerate(arms)
    }
    with house_style():
        legend_rows = -(-len(arms) // 3)
        figure = new_figure(max(1.0 + 3.3 * len(errors), 5.2), 1.2 + 2.9 * len(hooks) + 0.2 * legend_rows)
        grid = figure.subplots(len(hooks), len(errors), squeeze=False)
        handles = {}
        for row, hook in enumerate(hooks):
            here = [point for point in points if point.hook == hook]
            for column, (key, name) in enumerate(errors):
                axes = grid[row, column]
                for arm, line in by_arm(here, key).items():
                    x, y = [point.l0 for point in line], [getattr(point, key) for point in line]
                    [handles[arm]] = axes.plot(x, y, linewidth=1.2, markersize=5, label=arm, **look[arm])
                _log_axes(axes)
                axes.set_title(name if len(hooks) == 1 else f"{name}\n{hook}")
                axes.set_xlabel("L0, non-sinks (log)" if axes.get_xscale() == "log" else "L0, non-sinks")
        ordered = [handles[arm] for arm in arms if arm in handles]
        figure.legend(handles=ordered, loc="outside lower center", ncols=3, handlelength=2)
        where = f" at {hooks[0]}" if len(hooks) == 1 else ""
        several = "" if len(points) == 1 else "s"
        add_header(figure, f"Sparsity against error of {fmt.count(len(points))} SAE{several}{where}", caption)
    return figure


def _log_axes(axes: Axes) -> None:
    """Log scales where every value is positive; y only where its values differ much."""
    for axis, parts, least in (
        (axes.xaxis, [line.get_xdata() for line in axes.lines], 1.0),
        (axes.yaxis, [line.get_ydata() for line in axes.lines], 5.0),
    ):
        numbers = [float(value) for part in parts for value in np.asarray(part, dtype=np.float64)]
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > least:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            axis.set_major_locator(log_ticks(min(numbers), max(numbers)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(plain_tick))
