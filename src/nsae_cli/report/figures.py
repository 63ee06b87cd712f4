"""Every figure of nsae, and `save_png`. Each function returns a matplotlib Figure; nothing touches pyplot."""

from nsae_cli.report.activation_figure import activation_figure
from nsae_cli.report.comparison_figures import comparison_differences, comparison_fronts
from nsae_cli.report.norm_figures import norm_heatmap, norm_heatmap_position0
from nsae_cli.report.style import png_bytes, save_png
from nsae_cli.report.top_norm_figures import compare_histograms, l0_histogram, l1_histogram
from nsae_cli.report.training_figure import training_curves

__all__ = [
    "activation_figure",
    "compare_histograms",
    "comparison_differences",
    "comparison_fronts",
    "l0_histogram",
    "l1_histogram",
    "norm_heatmap",
    "norm_heatmap_position0",
    "png_bytes",
    "save_png",
    "training_curves",
]
