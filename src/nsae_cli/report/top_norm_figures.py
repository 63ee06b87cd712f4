"""Per-token L0 and L1 of an SAE as histograms in three colours: the highest norms, the lowest, all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from nsae_cli.report import format as fmt
from nsae_cli.report.style import BLUE, GREEN, GREY, PURPLE, VERMILION, add_header, house_style, new_figure, plain_tick

Quantity = Literal["l0", "l1"]
Split = Literal["group", "kind"]

#: A range of values wider than this is drawn on a logarithmic x-axis.
WIDE_RANGE = 50.0
_BINS = 70
_AXIS_LABEL = {"l0": "L0: active features per token", "l1": "L1: sum of activations per token"}
_NAME = {"l0": "L0", "l1": "L1"}


@dataclass(frozen=True)
class _Part:
    """One colour of the stack: the code in the array, the key in top_norms.json; the first part lies lowest."""

    code: int
    key: str
    colour: str


_PARTS: dict[str, tuple[_Part, ...]] = {
    "group": (_Part(2, "top", VERMILION), _Part(0, "bottom", BLUE), _Part(1, "other", GREY)),
    "kind": (_Part(1, "special", GREEN), _Part(2, "position0", PURPLE), _Part(0, "ordinary", GREY)),
}


@dataclass(frozen=True)
class _Bins:
    edges: np.ndarray
    log: bool
    zeros: bool


def l0_histogram(
    arrays: Mapping[str, np.ndarray],
    top_norms: Mapping[str, Any],
    *,
    log: bool = True,
    split: Split = "group",
    source: Mapping[str, Any] | None = None,
) -> Figure:
    """Histogram of the number of active features per token.

    Args:
        arrays: the tensors of top_norms.safetensors (`l0`, `group`; `kind` for ``split="kind"``).
        top_norms: top_norms.json.
        log: logarithmic count axis; the groups are 1 % against 98 % of the rows.
        split: colours by norm ("group") or by position 0 / special token / ordinary ("kind").
        source: where `context_size`, `packing`, `bos` are to be found if not in `top_norms` (manifest, norms.json).
    """
    return _histogram("l0", arrays, top_norms, log=log, split=split, source=source)


def l1_histogram(
    arrays: Mapping[str, np.ndarray],
    top_norms: Mapping[str, Any],
    *,
    log: bool = True,
    split: Split = "group",
    source: Mapping[str, Any] | None = None,
) -> Figure:
    """Histogram of the sum of activations per token; arguments as in `l0_histogram`."""
    return _histogram("l1", arrays, top_norms, log=log, split=split, source=source)


def compare_histograms(
    saes: Sequence[tuple[str, Mapping[str, np.ndarray], Mapping[str, Any]]],
    quantity: Quantity = "l0",
    *,
    log: bool = True,
    split: Split = "group",
    source: Mapping[str, Any] | None = None,
) -> Figure:
    """One panel per SAE, common axes and bins.

    Args:
        saes: (label, arrays, top_norms.json) of each SAE, drawn in this order.
        quantity: "l0" or "l1".
        log, split, source: as in `l0_histogram`.
    """
    if not saes:
        raise ValueError("compare_histograms needs at least one SAE")
    columns = min(len(saes), 2 if len(saes) in (2, 4) else 3)
    rows = -(-len(saes) // columns)
    bins = _make_bins([np.asarray(arrays[quantity]) for _, arrays, _ in saes], whole=quantity == "l0")
    with house_style():
        figure = new_figure(max(1.2 + 3.3 * columns, 6.0), 1.5 + 2.25 * rows)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        panels: list[Axes] = list(grid.flat)
        highest = 0.0
        for axes, (label, arrays, _) in zip(panels, saes, strict=False):
            highest = max(highest, _draw(axes, arrays, quantity, split, bins, log))
            axes.set_title(fmt.folded(label, 30), fontweight="bold")
        for place, axes in enumerate(panels):
            if place >= len(saes):
                axes.set_visible(False)
            elif place + columns >= len(saes):
                axes.tick_params(axis="x", labelbottom=True)
                axes.set_xlabel(_x_label(quantity, bins))
            if place % columns == 0:
                axes.set_ylabel(_y_label(log))
        _finish_y(panels[0], log, highest)
        alike = len({tuple(_rows(arrays, part, split) for part in _PARTS[split]) for _, arrays, _ in saes}) == 1
        first = saes[0]
        figure.legend(handles=_handles(first[1], first[2], split, with_rows=alike), loc="outside lower center", ncols=3)
        caption = _caption(first[2], source, log=log, with_sae=False)
        add_header(
            figure,
            f"Per-token {_NAME[quantity]} of {len(saes)} SAE{'s' if len(saes) > 1 else ''}{_split_title(split)}",
            caption,
        )
    return figure


def _histogram(
    quantity: Quantity,
    arrays: Mapping[str, np.ndarray],
    top_norms: Mapping[str, Any],
    *,
    log: bool,
    split: Split,
    source: Mapping[str, Any] | None,
) -> Figure:
    bins = _make_bins([np.asarray(arrays[quantity])], whole=quantity == "l0")
    with house_style():
        figure = new_figure(7.2, 4.3)
        axes = figure.add_subplot()
        highest = _draw(axes, arrays, quantity, split, bins, log)
        axes.set_xlabel(_x_label(quantity, bins))
        axes.set_ylabel(_y_label(log))
        _finish_y(axes, log, highest)
        figure.legend(handles=_handles(arrays, top_norms, split), loc="outside lower center", ncols=3)
        add_header(figure, f"Per-token {_NAME[quantity]}{_split_title(split)}", _caption(top_norms, source, log=log))
    return figure


def binned_groups(arrays: Mapping[str, np.ndarray], quantity: Quantity) -> dict[str, Any]:
    """The histogram as numbers, for a page: `edges` (of log10 where `log`), `counts` per group, `ticks`.

    Where `log` and some values are 0, the first bin holds the zeros and the second is an empty gap.
    """
    values, codes = np.asarray(arrays[quantity]), np.asarray(arrays["group"])
    bins = _make_bins([values], whole=quantity == "l0")
    edges = _drawn_edges(bins)
    drawn = np.log10(edges) if bins.log else edges
    at = _log_tick_values(bins, edges) if bins.log else None
    return {
        "log": bins.log,
        "zeros": bins.zeros,
        "edges": [float(f"{edge:.5g}") for edge in drawn],
        "counts": {part.key: _counts(values[codes == part.code], bins).tolist() for part in _PARTS["group"]},
        "ticks": None
        if at is None
        else {"at": [round(float(np.log10(tick)), 5) for tick, _ in at], "text": [text for _, text in at]},
    }


def _make_bins(values: Sequence[np.ndarray], *, whole: bool) -> _Bins:
    """Common bins for all SAEs of a figure: linear, or logarithmic where the values span more than `WIDE_RANGE`.

    Whole numbers get edges at halves. On a log axis the zeros get a bin of their own at the left end.
    """
    joined = np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in values])
    joined = joined[np.isfinite(joined)]
    positive = joined[joined > 0]
    if not positive.size:
        return _Bins(np.array([-0.5, 0.5]), log=False, zeros=False)
    low, high = float(np.quantile(positive, 0.01)), float(positive.max())
    if high / low <= WIDE_RANGE:
        if whole:
            step = max(1, int(np.ceil((high + 1) / _BINS)))
            start = np.floor(joined.min() / step) * step - 0.5
            return _Bins(np.arange(start, high + step + 0.5, step), log=False, zeros=False)
        start = float(joined.min()) if joined.min() > 0.1 * high else 0.0
        return _Bins(
            np.linspace(start, high * (1 + 1e-9) if high > start else start + 1, _BINS + 1), log=False, zeros=False
        )
    zeros = bool(np.any(joined == 0))
    if whole:
        first = max(float(positive.min()), 1.0)
        steps = np.unique(np.round(np.geomspace(first, high + 1, _BINS + 1)))
        return _Bins(steps - 0.5, log=True, zeros=zeros)
    # Values far below the 1 % quantile join the first bin's neighbours: at most six decades are drawn.
    first = max(float(positive.min()), high * 1e-6)
    return _Bins(np.geomspace(first * (1 - 1e-9), high * (1 + 1e-9), _BINS + 1), log=True, zeros=zeros)


def _counts(values: np.ndarray, bins: _Bins) -> np.ndarray:
    """Tokens per bin; where the zeros have their own bin, their number and an empty gap come first. No row is lost."""
    values = np.asarray(values, dtype=np.float64)
    positive = values[values > 0] if bins.log else values
    counted = np.histogram(np.clip(positive, bins.edges[0], bins.edges[-1]), bins.edges)[0]
    return np.concatenate([[np.count_nonzero(values <= 0), 0], counted]) if bins.zeros else counted


def _drawn_edges(bins: _Bins) -> np.ndarray:
    """The bins' edges on the axis; the zeros' bin and a gap stand left of the first positive bin."""
    if not bins.zeros:
        return bins.edges
    step = (bins.edges[-1] / bins.edges[0]) ** (1 / 40)
    return np.concatenate([[bins.edges[0] / step**3, bins.edges[0] / step], bins.edges])


def _draw(
    axes: Axes, arrays: Mapping[str, np.ndarray], quantity: Quantity, split: Split, bins: _Bins, log: bool
) -> float:
    """Draws the stacked parts and answers with the highest stack."""
    values, codes = np.asarray(arrays[quantity]), np.asarray(arrays[split])
    edges = _drawn_edges(bins)
    base = np.zeros(len(edges) - 1)
    for part in _PARTS[split]:
        total = base + _counts(values[codes == part.code], bins)
        # A log axis has no 0: the stack starts at half a token, below the axis' lower end.
        low, high = (np.maximum(base, 0.5), np.maximum(total, 0.5)) if log else (base, total)
        axes.stairs(high, edges, baseline=low, fill=True, color=part.colour, linewidth=0, label=part.key)
        base = total
    if bins.log:
        _log_axis(axes, bins, edges)
    else:
        room = 0.015 * (edges[-1] - edges[0])
        axes.set_xlim(edges[0] - room, edges[-1] + room)
        axes.xaxis.set_major_formatter(FuncFormatter(plain_tick))
    return float(base.max())


def _log_axis(axes: Axes, bins: _Bins, edges: np.ndarray) -> None:
    axes.set_xscale("log")
    margin = (edges[-1] / edges[0]) ** 0.015
    axes.set_xlim(edges[0] / margin, edges[-1] * margin)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = dict(_log_tick_values(bins, edges))
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: next((text for at, text in ticks.items() if abs(value / at - 1) < 1e-6), ""))
    )


def _log_tick_values(bins: _Bins, edges: np.ndarray) -> list[tuple[float, str]]:
    """Where the log axis is labelled, and with what; the zeros' bin with 0."""
    decades = np.log10(bins.edges[-1] / bins.edges[0])
    subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 3.4 else (1.0,)
    ticks = [float(tick) for tick in LogLocator(subs=subs, numticks=30).tick_values(bins.edges[0], bins.edges[-1])
             if bins.edges[0] <= tick <= bins.edges[-1]]  # fmt: skip
    if not bins.zeros:
        return [(tick, plain_tick(tick)) for tick in ticks]
    zero = float(np.sqrt(edges[0] * edges[1]))
    # The first labelled value keeps clear of the "0" of the zeros' bin.
    kept = [tick for tick in ticks if tick / zero > (edges[-1] / edges[0]) ** 0.05]
    return [(zero, "0"), *((tick, plain_tick(tick)) for tick in kept)]


def _finish_y(axes: Axes, log: bool, highest: float) -> None:
    if log:
        axes.set_yscale("log")
        axes.set_ylim(0.7, max(highest * 2, 10))
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max(highest * 1.05, 1))
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))


def _x_label(quantity: Quantity, bins: _Bins) -> str:
    if not bins.log:
        return _AXIS_LABEL[quantity]
    return f"{_AXIS_LABEL[quantity]}\n(log axis and bins{'; leftmost bin: 0' if bins.zeros else ''})"


def _y_label(log: bool) -> str:
    return "tokens per bin, stacked (log)" if log else "tokens per bin, stacked"


def _split_title(split: Split) -> str:
    return ", by norm of the token" if split == "group" else ", by kind of token"


def _rows(arrays: Mapping[str, np.ndarray], part: _Part, split: Split) -> int:
    return int(np.count_nonzero(np.asarray(arrays[split]) == part.code))


def _part_name(part: _Part, top_norms: Mapping[str, Any]) -> str:
    share = fmt.plain_percent(top_norms.get("top"))
    return {
        "top": f"top {share} by norm",
        "bottom": f"bottom {share} by norm",
        "other": "other",
        "position0": "position 0",
        "special": "other special tokens",
        "ordinary": "ordinary tokens",
    }[part.key]


def _handles(
    arrays: Mapping[str, np.ndarray], top_norms: Mapping[str, Any], split: Split, *, with_rows: bool = True
) -> list[Patch]:
    handles = []
    for part in _PARTS[split]:
        name = _part_name(part, top_norms)
        label = f"{name} ({fmt.count(_rows(arrays, part, split))} tokens)" if with_rows else name
        handles.append(Patch(color=part.colour, linewidth=0, label=label))
    return handles


def _caption(
    top_norms: Mapping[str, Any], source: Mapping[str, Any] | None, *, log: bool, with_sae: bool = True
) -> str:
    sae, activations = (fmt.artifact_name(top_norms.get(key)) for key in ("sae", "activations"))
    parts = [f"SAE {sae}"] if with_sae and sae else []
    if activations:
        parts.append(f"activations {activations}")
    parts.append(f"{fmt.count(top_norms.get('rows'))} held-out tokens")
    parts.append(fmt.source_line(fmt.merged_source(top_norms, source)))
    line = " · ".join(parts)
    return f"{line}\nStacked on a log axis: the upper edge of a colour is the sum up to it." if log else line
