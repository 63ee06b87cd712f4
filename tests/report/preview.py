"""Draws every figure and prints every table from made-up data: python tests/report/preview.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console

from conftest import make_norms, make_run, make_top_norms, make_training_rows
from nsae_cli.report import figures, tables


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    norms, arrays = make_norms()
    one, one_arrays = make_norms(1)
    histogram, table = make_top_norms()[1], make_top_norms()[0]
    near = make_top_norms("close", top_l0=30, top_l1=150)
    near[1]["l1"][5:40] = 0
    zeros = {**histogram, "l1": np.where(np.arange(histogram["l1"].size) % 50 == 7, 0, histogram["l1"])}
    zeros["l0"] = np.where(np.arange(histogram["l0"].size) % 50 == 7, 0, histogram["l0"] * 10)
    names = ("relu-none", "relu-norm", "relu-sq", "tanh-relu-none", "tanh-relu-norm", "tanh-relu-sq")
    several = []
    for place, name in enumerate(names):
        made = make_top_norms(name, top_l0=9 + 40 * place, top_l1=3000 / (1 + place))
        several.append((name, made[1], made[0]))
    x = np.linspace(-2, 4, 601)
    relu, tanh = np.maximum(x, 0), np.tanh(np.maximum(x, 0))
    step = np.where(x > 0, 1.0, 0.0)
    curves = {"relu": (relu, step), "tanh(relu)": (tanh, step * (1 - tanh**2))}
    caption = "activations gpt2-resid_post-3f9a1c · context 128, packed"
    drawn = {
        "norms": figures.norm_heatmap(norms, arrays["counts"], arrays["edges"]),
        "norms-1": figures.norm_heatmap(one, one_arrays["counts"], one_arrays["edges"]),
        "norms-position0": figures.norm_heatmap_position0(
            norms, arrays["counts"], arrays["edges"], arrays["position0_counts"]
        ),
        "norms-position0-1": figures.norm_heatmap_position0(
            one, one_arrays["counts"], one_arrays["edges"], one_arrays["position0_counts"]
        ),
        "l0": figures.l0_histogram(histogram, table, source=norms),
        "l0-linear": figures.l0_histogram(histogram, table, log=False, source=norms),
        "l0-kind": figures.l0_histogram(histogram, table, split="kind", source=norms),
        "l0-zeros": figures.l0_histogram(zeros, table, source=norms),
        "l1": figures.l1_histogram(histogram, table, source=norms),
        "l1-zeros": figures.l1_histogram(zeros, table, source=norms),
        "l1-near": figures.l1_histogram(near[1], near[0], source=norms),
        "compare-l0": figures.compare_histograms(several, "l0", source=norms),
        "compare-l1": figures.compare_histograms(several[:4], "l1", source=norms),
        "compare-5": figures.compare_histograms(several[:5], "l1", source=norms),
        "activations": figures.activation_figure(x, curves),
        "training": figures.training_curves([("gpt2-L6-relu", make_training_rows())], caption),
        "training-6": figures.training_curves(
            [(name, make_training_rows(seed=seed)) for seed, name in enumerate(names)], caption
        ),
    }
    for name, figure in drawn.items():
        assert figure is not None, name
        figures.save_png(figure, folder / f"{name}.png")


def show(width: int) -> None:
    console = Console(width=width, highlight=False)
    norms, _ = make_norms()
    reports = [make_top_norms(f"gpt2-L6/L6-{name}")[0] for name in ("relu-none", "relu-sq", "tanh-relu-none")]
    runs = [make_run(act, l2) for act in ("relu", "tanh-relu") for l2 in ("none", "norm", "sq")]
    rows = [
        {"kind": "activations", "name": "gpt2-resid_post-3f9a1c", "status": "complete", "size": 3_145_728_000,
         "detail": "2,000,000 tokens, layer 6, context 128"},
        {"kind": "sae", "name": "gpt2-resid_post-3f9a1c-L6-relu-none-0b12de/L6-tanh-relu-sq-seed1",
         "status": "unfinished", "size": 37_800_000, "detail": "step 400 of 2,000"},
    ]  # fmt: skip
    for part in (
        tables.norms_table(norms),
        tables.train_table(runs, source=norms),
        tables.train_table(runs[:1]),
        tables.top_norms_table(reports[:1], source=norms),
        *tables.top_norms_findings(reports[0]),
        tables.top_norms_table(reports, source=norms),
        tables.workspace_table(rows),
    ):
        console.print(part)
        console.rule()


if __name__ == "__main__":
    show(80)
    show(110)
    draw(Path(sys.argv[1]))
