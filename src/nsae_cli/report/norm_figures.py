"""Norms over layers: how ‖x‖ is distributed at each hook, with and without position 0 set apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nsae_cli.report import format as fmt
from nsae_cli.report.style import add_header, house_style, log_limits, log_ticks, new_figure, plain_tick


def norm_heatmap(norms: Mapping[str, Any], counts: np.ndarray, edges: np.ndarray) -> Figure:
    """Layer on x, norm on a log y-axis, colour = proportion of the hook's tokens (log); empty cells are white.

    Args:
        norms: norms.json.
        counts: int [hooks, bins], tokens per bin of log10 ‖x‖, in the order of ``norms["hooks"]``.
        edges: [bins + 1], edges of log10 ‖x‖.
    """
    hooks = norms["hooks"]
    proportions = _proportions(counts, [hook.get("rows") for hook in hooks])
    with house_style():
        figure = new_figure(max(5.2, min(2.6 + 0.42 * len(hooks), 13)), 4.8)
        axes = figure.add_subplot()
        scale = _colour_scale([proportions])
        _draw(axes, hooks, proportions, edges, scale)
        _set_norm_axis(axes, counts, edges)
        _draw_medians(axes, [hook.get("median") for hook in hooks])
        _label_layers(axes, hooks)
        axes.set_ylabel("norm ‖x‖₂ of the residual stream (log)")
        _colour_bar(figure, [axes], scale, "proportion of the layer's tokens (log)")
        add_header(figure, _title(norms), f"{_caption(norms)}\nLine: median of all tokens. White: no token.")
    return figure


def norm_heatmap_position0(
    norms: Mapping[str, Any], counts: np.ndarray, edges: np.ndarray, position0_counts: np.ndarray | None
) -> Figure | None:
    """The heat map in two panels on common axes: positions ≥ 1, and position 0; each column of each panel sums to 1.

    Args:
        norms, counts, edges: as in `norm_heatmap`.
        position0_counts: int [hooks, bins], the part of `counts` that sits at position 0; None or all zero where the
            store has no positions.

    Returns:
        None where there is no position 0 to set apart.
    """
    if position0_counts is None or not np.any(position0_counts):
        return None
    hooks = norms["hooks"]
    parts = [np.asarray(counts) - np.asarray(position0_counts), np.asarray(position0_counts)]
    proportions = [_proportions(part, None) for part in parts]
    with house_style():
        figure = new_figure(max(7.4, min(3.2 + 0.66 * len(hooks), 15)), 4.8)
        panels = list(figure.subplots(1, 2, sharex=True, sharey=True))
        scale = _colour_scale(proportions)
        for axes, part, proportion, name in zip(
            panels, parts, proportions, ("positions ≥ 1", "position 0"), strict=True
        ):
            _draw(axes, hooks, proportion, edges, scale)
            totals = part.sum(axis=1)
            tokens = fmt.count(int(totals.max()))
            axes.set_title(f"{name} ({tokens} tokens{' per layer' if len(hooks) > 1 else ''})")
            _label_layers(axes, hooks)
        _set_norm_axis(panels[0], counts, edges)
        panels[0].set_ylabel("norm ‖x‖₂ of the residual stream (log)")
        _colour_bar(figure, panels, scale, "proportion of the panel's tokens in the layer (log)")
        add_header(figure, f"{_title(norms)}, position 0 apart", f"{_caption(norms)}\nWhite: no token.")
    return figure


def _proportions(counts: np.ndarray, rows: Sequence[int | None] | None) -> np.ma.MaskedArray:
    """Counts ÷ rows of the hook, [bins, hooks]; cells without a token are masked."""
    counts = np.asarray(counts, dtype=np.float64)
    totals = counts.sum(axis=1)
    if rows is not None:
        totals = np.array([row or total for row, total in zip(rows, totals, strict=True)], dtype=np.float64)
    shares = counts / np.maximum(totals, 1)[:, None]
    return np.ma.masked_equal(shares.T, 0.0)


def _palette() -> Colormap:
    """Light to dark, without the palest tones: a cell with one token must stand out from white."""
    return ListedColormap(colormaps["magma_r"](np.linspace(0.14, 0.97, 256)), name="proportion")


def _colour_scale(parts: Sequence[np.ma.MaskedArray]) -> LogNorm:
    filled = np.concatenate([part.compressed() for part in parts])
    low, high = (filled.min(), filled.max()) if filled.size else (0.1, 1.0)
    first = 10.0 ** np.floor(np.log10(low) + 1e-9)
    last = max(min(1.0, 10.0 ** np.ceil(np.log10(high) - 1e-9)), first * 10)
    return LogNorm(first, last)


def _draw(
    axes: Axes,
    hooks: Sequence[Mapping[str, Any]],
    proportions: np.ma.MaskedArray,
    edges: np.ndarray,
    scale: LogNorm,
) -> None:
    columns = np.arange(len(hooks) + 1) - 0.5
    axes.set_yscale("log")
    axes.pcolormesh(
        columns,
        10.0 ** np.asarray(edges, dtype=np.float64),
        proportions,
        norm=scale,
        cmap=_palette(),
        rasterized=True,
    )
    axes.set_xlim(columns[0], columns[-1])


def _set_norm_axis(axes: Axes, counts: np.ndarray, edges: np.ndarray) -> None:
    """Limits around the filled bins; ticks as dense as the range allows."""
    filled = np.flatnonzero(np.asarray(counts).sum(axis=0))
    low, high = (10.0 ** float(edges[filled[0]]), 10.0 ** float(edges[filled[-1] + 1])) if filled.size else (1.0, 10.0)
    axes.set_ylim(*log_limits(low, high))
    axes.yaxis.set_major_locator(log_ticks(low, high))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_medians(axes: Axes, medians: Sequence[float | None]) -> None:
    """A bar across each column, joined by a thin line."""
    values = np.array([np.nan if median is None else median for median in medians], dtype=np.float64)
    outline = [patheffects.Stroke(linewidth=3, foreground="black"), patheffects.Normal()]
    places = np.arange(len(values))
    axes.plot(places, values, color="white", linewidth=1.0, path_effects=outline, zorder=3, label="median")
    axes.hlines(
        values, places - 0.32, places + 0.32, color="white", linewidth=1.4,
        path_effects=[patheffects.Stroke(linewidth=3.2, foreground="black"), patheffects.Normal()], zorder=4,
    )  # fmt: skip


def _label_layers(axes: Axes, hooks: Sequence[Mapping[str, Any]]) -> None:
    step = max(1, -(-len(hooks) // 24))
    places = range(0, len(hooks), step)
    axes.set_xticks(list(places), [fmt.layer_label(hooks[place]) for place in places])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer")


def _colour_bar(figure: Figure, panels: Sequence[Axes], scale: LogNorm, label: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(scale, _palette()), ax=list(panels), pad=0.015, fraction=0.06, aspect=28, label=label
    )
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(LogLocator(numticks=12))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.6g} %"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _title(norms: Mapping[str, Any]) -> str:
    hooks = norms["hooks"]
    site = norms.get("site") or "the hooks' site"
    where = f"{site}, layer {fmt.layer_label(hooks[0])}" if len(hooks) == 1 else site
    return f"Token norms of {fmt.model_name(norms.get('model'))}, {where}"


def _caption(norms: Mapping[str, Any]) -> str:
    rows = sorted({hook["rows"] for hook in norms["hooks"] if hook.get("rows") is not None})
    tokens = f"{fmt.count(rows[-1])} tokens per layer" if rows else "token count not recorded"
    parts = [tokens, fmt.source_line(norms)]
    if name := fmt.artifact_name(norms.get("activations")):
        parts.append(f"activations {name}")
    return " · ".join(parts)
