"""The activation functions and their derivatives, as computed by the caller."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from nsae_cli.report.style import DASHES, FAINT, SERIES, add_header, house_style, new_figure


def activation_figure(x: np.ndarray, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Two panels: act(z), and d act / d z.

    Args:
        x: [points], the pre-activations z.
        curves: name → (value [points], derivative [points]), for example "relu" and "tanh(relu)". A jump of the
            derivative is drawn as a gap where the caller puts NaN.
    """
    x = np.asarray(x, dtype=np.float64)
    with house_style():
        figure = new_figure(7.2, 3.5)
        panels = list(figure.subplots(1, 2, sharex=True))
        for panel, axes in enumerate(panels):
            for place, (name, pair) in enumerate(curves.items()):
                axes.plot(
                    x, np.asarray(pair[panel], dtype=np.float64), color=SERIES[place % len(SERIES)], linewidth=2,
                    linestyle=DASHES[min(place, len(DASHES) - 1)], label=name,
                )  # fmt: skip
            for line in (axes.axhline, axes.axvline):
                line(0, color=FAINT, linewidth=0.6, zorder=0)
            axes.set_xlabel("pre-activation z")
            axes.set_xlim(x.min(), x.max())
        panels[0].axhline(1, color=FAINT, linewidth=0.6, linestyle=(0, (2, 2)), zorder=0)
        panels[0].set_title("act(z)")
        panels[1].set_title("derivative d act / d z")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=2)
        add_header(figure, f"Activation functions: {' and '.join(curves)}", "")
    return figure
