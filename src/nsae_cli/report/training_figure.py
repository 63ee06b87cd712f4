"""How training went: loss, sparsity, error and who the loss listened to, over the tokens seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nsae_cli.report import format as fmt
from nsae_cli.report.style import (
    DASHES,
    FAINT,
    SERIES,
    VERMILION,
    add_header,
    house_style,
    log_ticks,
    new_figure,
    plain_tick,
)

Rows = Sequence[Mapping[str, Any]]


def training_curves(saes: Sequence[tuple[str, Rows]], caption: str = "") -> Figure:
    """Four panels over training tokens: loss, non-sink L0, non-sink FVU, norm bias ratio.

    With one SAE the last panel shows the sinks and every norm bin; with several, the sinks (solid) and the highest
    norm bin (dotted) of each. Null values leave gaps.

    Args:
        saes: (label, rows of metrics.jsonl) of each SAE.
        caption: where the rows come from (activations, context, packing).
    """
    if not saes:
        raise ValueError("training_curves needs the rows of at least one SAE")
    many = len(saes) > 1
    with house_style():
        figure = new_figure(8.6, 6.0 + 0.2 * (-(-len(saes) // 3) if many else 1))
        grid: np.ndarray = figure.subplots(2, 2, sharex=True)
        loss, l0, fvu, bias = grid.flat
        for place, (label, rows) in enumerate(saes):
            look = {"color": SERIES[place % len(SERIES)], "linestyle": DASHES[(place // len(SERIES)) % len(DASHES)]}
            tokens = series(rows, "tokens")
            for axes, key in ((loss, "loss"), (l0, "l0_ns"), (fvu, "fvu_ns")):
                axes.plot(tokens, series(rows, key), linewidth=1.5, label=label, **look)
            if many:
                ratios = bias_table(rows)
                bias.plot(tokens, ratios[:, 0], linewidth=1.5, **look)
                bias.plot(tokens, ratios[:, -1], linewidth=1.5, color=look["color"], linestyle=(0, (1, 1.2)))
            else:
                draw_bins(bias, tokens, bias_table(rows))
        loss.set_title("loss (each SAE's own objective)" if many else "loss")
        l0.set_title("L0, non-sink tokens (active features per token)")
        fvu.set_title("FVU, non-sink tokens (1 = predicting the mean)")
        bias.set_title(
            "norm bias: share of loss ÷ share of tokens" + ("\nsolid: sinks, dotted: highest bin" if many else "")
        )
        bias.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
        for axes in (loss, l0, fvu, bias):
            log_where_positive([axes])
        for axes in (fvu, bias):
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_formatter(FuncFormatter(tokens_tick))
        if many:
            figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=2)
        else:
            bias.legend(loc="best", handlelength=1.4)
        name = f"Training of {len(saes)} SAEs" if many else f"Training of {saes[0][0]}"
        add_header(figure, name, caption)
    return figure


def series(rows: Rows, key: str) -> np.ndarray:
    """A column of metrics.jsonl, NaN where it is null: [rows]."""
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64)


def bias_table(rows: Rows) -> np.ndarray:
    """[rows, 11]: sinks, then the norm bins from lowest to highest."""
    table = np.full((len(rows), 11), np.nan)
    for place, row in enumerate(rows):
        values = row.get("bias_ratio")
        if isinstance(values, Mapping):
            values = [values.get(key) for key in ("sinks", *(f"b{number}" for number in range(10)))]
        for column, value in enumerate((values or [])[:11]):
            table[place, column] = np.nan if value is None else value
    return table


def draw_bins(axes: Axes, tokens: np.ndarray, ratios: np.ndarray) -> None:
    """A line per norm bin and, where they have values, the sinks'."""
    shades = colormaps["viridis"](np.linspace(0.05, 0.92, 10))
    names = {0: "bin 0 (lowest norms)", 9: "bin 9 (highest norms)"}
    for place in range(10):
        axes.plot(tokens, ratios[:, place + 1], linewidth=1.1, color=shades[place], label=names.get(place, "_"))
    if np.isfinite(ratios[:, 0]).any():
        axes.plot(tokens, ratios[:, 0], linewidth=2, color=VERMILION, label="sinks")


def log_where_positive(panels: Sequence[Axes]) -> None:
    """Log y-axes where every value in the panels is positive and they span more than a factor of 3."""
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for axes in panels for line in axes.lines]
    values = np.concatenate(drawn) if drawn else np.array([])
    values = values[np.isfinite(values)]
    for axes in panels:
        if values.size and values.min() > 0 and values.max() / values.min() > 3:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(log_ticks(values.min(), values.max()))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))


def tokens_tick(value: float, _position: int | None = None) -> str:
    """A tick of training tokens: 500k, 2M."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:g}B"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 else fmt.count(int(value))
