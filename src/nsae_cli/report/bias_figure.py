"""Whom the loss listens to: the norm bias of every bin over training, one panel per SAE."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nsae_cli.report import format as fmt
from nsae_cli.report.style import FAINT, add_header, house_style, new_figure
from nsae_cli.report.training_figure import Rows, bias_table, draw_bins, log_where_positive, series, tokens_tick


def bias_figure(saes: Sequence[tuple[str, Rows]], caption: str = "") -> Figure:
    """bias_ratio (share of loss ÷ share of tokens) of the ten norm bins and the sinks over training tokens.

    Args:
        saes: (label, rows of metrics.jsonl) of each SAE; one panel each, on common axes.
        caption: where the rows come from.
    """
    if not saes:
        raise ValueError("bias_figure needs the rows of at least one SAE")
    columns = min(len(saes), 2 if len(saes) in (2, 4) else 3)
    lines = -(-len(saes) // columns)
    with house_style():
        figure = new_figure(max(1.0 + 3.2 * columns, 6.2), 1.5 + 2.3 * lines)
        panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
        for place, axes in enumerate(panels):
            if place >= len(saes):
                axes.set_visible(False)
                continue
            label, rows = saes[place]
            draw_bins(axes, series(rows, "tokens"), bias_table(rows))
            axes.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
            axes.xaxis.set_major_formatter(FuncFormatter(tokens_tick))
            if len(saes) > 1:
                axes.set_title(fmt.folded(label, 32), fontweight="bold")
            if place + columns >= len(saes):
                axes.tick_params(axis="x", labelbottom=True)
                axes.set_xlabel("training tokens")
            if place % columns == 0:
                axes.set_ylabel("share of loss ÷ share of tokens")
        log_where_positive(panels[: len(saes)])
        drawn = [panel.get_legend_handles_labels() for panel in panels[: len(saes)]]
        # Sinks may be missing from the first panel.
        handles, labels = max(drawn, key=lambda one: len(one[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=1.6)
        name = f"Norm bias of {len(saes)} SAEs" if len(saes) > 1 else f"Norm bias of {saes[0][0]}"
        note = "Bins: tenths of the non-sink tokens by norm. 1: every token counts alike."
        add_header(figure, f"{name} over training", f"{caption}\n{note}" if caption else note)
    return figure
