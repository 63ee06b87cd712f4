"""Every figure of nsae, and how they are saved. Each function returns a matplotlib Figure; nothing touches pyplot."""

from nsae_cli.report.activation_figure import activation_figure
from nsae_cli.report.bias_figure import bias_figure
from nsae_cli.report.comparison_figures import comparison_differences, comparison_fronts
from nsae_cli.report.norm_figures import norm_heatmap, norm_heatmap_position0
from nsae_cli.report.pareto_figure import pareto_figure
from nsae_cli.report.style import FORMATS, figure_bytes, png_bytes, save_figure, save_png
from nsae_cli.report.top_norm_figures import compare_histograms, l0_histogram, l1_histogram
from nsae_cli.report.training_figure import training_curves

__all__ = [
    "FORMATS",
    "activation_figure",
    "bias_figure",
    "compare_histograms",
    "comparison_differences",
    "comparison_fronts",
    "figure_bytes",
    "l0_histogram",
    "l1_histogram",
    "norm_heatmap",
    "norm_heatmap_position0",
    "pareto_figure",
    "png_bytes",
    "save_figure",
    "save_png",
    "training_curves",
]
