from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image

from nsae_cli.errors import ResourceError
from nsae_cli.report import figures
from nsae_cli.report.style import DPI

Artifact = tuple[dict[str, Any], dict[str, np.ndarray]]
Make = Callable[..., Artifact]


def texts(figure: Figure) -> str:
    """Title and caption."""
    return "\n".join(text.get_text() for text in figure.texts)


def mesh(axes: Axes) -> np.ma.MaskedArray:
    [found] = [one for one in axes.collections if isinstance(one, QuadMesh)]
    return np.ma.asarray(found.get_array())


def stacks(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """label → (upper edges, bin edges, lower edges)."""
    found = {}
    for one in axes.patches:
        if isinstance(one, StepPatch):
            upper, edges, lower = one.get_data()
            found[str(one.get_label())] = (np.asarray(upper), np.asarray(edges), np.asarray(lower))
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_the_heat_map_shows_the_proportions_on_log_axes(norms: Artifact) -> None:
    artifact, arrays = norms
    figure = figures.norm_heatmap(artifact, arrays["counts"], arrays["edges"])
    axes = figure.axes[0]
    shown = mesh(axes)
    rows = np.array([hook["rows"] for hook in artifact["hooks"]])
    assert np.array_equal(shown.filled(0), (arrays["counts"] / rows[:, None]).T)
    assert np.array_equal(shown.mask, arrays["counts"].T == 0)
    assert axes.get_yscale() == "log"
    assert np.allclose(axes.lines[0].get_ydata(), [hook["median"] for hook in artifact["hooks"]])
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(layer) for layer in range(12)]
    assert "Token norms of gpt2, resid_post" in texts(figure)
    assert "context 128, packed" in texts(figure)
    low, high = axes.get_ylim()
    assert low < 40
    assert high > 3100


def test_position_0_is_drawn_apart_on_common_axes(norms: Artifact) -> None:
    artifact, arrays = norms
    figure = figures.norm_heatmap_position0(artifact, arrays["counts"], arrays["edges"], arrays["position0_counts"])
    assert figure is not None
    rest, first = figure.axes[:2]
    for axes, counts in ((rest, arrays["counts"] - arrays["position0_counts"]), (first, arrays["position0_counts"])):
        assert np.allclose(mesh(axes).filled(0).sum(axis=0), 1)
        assert np.allclose(mesh(axes).filled(0), (counts / counts.sum(axis=1, keepdims=True)).T)
    assert rest.get_ylim() == first.get_ylim()
    assert "15,600 tokens" in first.get_title(loc="left")


def test_without_positions_there_is_no_second_figure(norms_of: Make) -> None:
    artifact, arrays = norms_of(2, positions=False)
    for missing in (arrays["position0_counts"], None):
        assert figures.norm_heatmap_position0(artifact, arrays["counts"], arrays["edges"], missing) is None


def test_one_hook_and_missing_facts(norms_of: Make) -> None:
    artifact, arrays = norms_of(1)
    artifact = {
        "hooks": [{**artifact["hooks"][0], "median": None, "layer": None}],
        "embedded_note": "mini-sink: placed",
    }
    figure = figures.norm_heatmap(artifact, arrays["counts"], arrays["edges"])
    assert mesh(figure.axes[0]).shape == (200, 1)
    assert "context length and packing not recorded" in texts(figure).replace("\n", " ")
    assert "mini-sink: placed" in texts(figure).replace("\n", " ")


@pytest.mark.parametrize("log", [True, False])
def test_histograms_lose_no_token(top_norms_of: Make, log: bool) -> None:
    artifact, arrays = top_norms_of(rows=20_000)
    for draw, key in ((figures.l0_histogram, "l0"), (figures.l1_histogram, "l1")):
        figure = draw(arrays, artifact, log=log)
        axes = figure.axes[0]
        drawn = stacks(axes)
        assert list(drawn) == ["top", "bottom", "other"]
        upper, edges, _ = drawn["other"]
        counted = np.histogram(arrays[key], edges)[0]
        assert counted.sum() == 20_000
        assert np.array_equal(np.maximum(upper, 0.5), np.maximum(counted, 0.5))
        top = np.histogram(arrays[key][arrays["group"] == 2], edges)[0]
        assert np.array_equal(np.maximum(drawn["top"][0], 0.5), np.maximum(top, 0.5))
        assert axes.get_yscale() == ("log" if log else "linear")
    assert legend(figure) == [
        "top 1 % by norm (200 tokens)", "bottom 1 % by norm (200 tokens)", "other (19,600 tokens)",
    ]  # fmt: skip


def test_a_wide_range_gets_a_log_axis_and_says_so(top_norms_of: Make) -> None:
    artifact, arrays = top_norms_of(rows=20_000)
    near = figures.l0_histogram(arrays, artifact).axes[0]
    far = figures.l1_histogram(arrays, artifact).axes[0]
    assert near.get_xscale() == "linear"
    assert "log" not in near.get_xlabel()
    assert far.get_xscale() == "log"
    assert "log axis and bins" in far.get_xlabel()


def test_zeros_on_a_log_axis_have_their_own_bin(top_norms_of: Make) -> None:
    artifact, arrays = top_norms_of(rows=20_000)
    l1 = np.where(np.arange(20_000) % 10 == 3, 0, arrays["l1"])
    axes = figures.l1_histogram({**arrays, "l1": l1}, artifact).axes[0]
    upper, edges, _ = stacks(axes)["other"]
    assert upper[0] == 2000
    assert np.maximum(upper, 0.5)[1] == 0.5
    assert edges[0] > 0
    assert "leftmost bin: 0" in axes.get_xlabel()
    assert np.where(upper > 0.5, upper, 0).sum() == 20_000


@pytest.mark.parametrize("values", [np.zeros(50), np.full(50, 7), np.arange(50) % 2, np.arange(50) * 1000.0])
def test_odd_distributions_are_drawn(values: np.ndarray) -> None:
    group = np.ones(50, dtype=np.uint8)
    group[0], group[1] = 0, 2
    arrays: dict[str, np.ndarray] = {
        "l0": values.astype(np.int32),
        "l1": values.astype(np.float32),
        "group": group,
        "kind": np.zeros(50, np.uint8),
    }
    artifact: dict[str, Any] = {"top": 0.02, "rows": 50}
    for draw, key in ((figures.l0_histogram, "l0"), (figures.l1_histogram, "l1")):
        axes = draw(arrays, artifact).axes[0]
        upper = stacks(axes)["other"][0]
        assert np.where(upper > 0.5, upper, 0).sum() == 50, key


def test_kinds_have_their_own_colours(top_norms_of: Make) -> None:
    artifact, arrays = top_norms_of(rows=20_000)
    figure = figures.l0_histogram(arrays, artifact, split="kind")
    assert legend(figure) == [
        "other special tokens (4 tokens)", "position 0 (156 tokens)", "ordinary tokens (19,840 tokens)",
    ]  # fmt: skip


@pytest.mark.parametrize("many", [1, 2, 6])
def test_saes_side_by_side_share_axes_and_bins(top_norms_of: Make, many: int) -> None:
    saes = []
    for place in range(many):
        artifact, arrays = top_norms_of(f"sae-{place}", rows=5_000, top_l1=3000 / (1 + place))
        saes.append((f"sae-{place}", arrays, artifact))
    figure = figures.compare_histograms(saes, "l1")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [label for label, _, _ in saes]
    assert len({axes.get_xlim() for axes in panels}) == 1
    first = stacks(panels[0])["other"][1]
    assert all(np.array_equal(stacks(axes)["other"][1], first) for axes in panels)
    assert len(legend(figure)) == 3


def test_the_activation_figure_draws_what_it_is_given() -> None:
    x = np.linspace(-1, 1, 5)
    figure = figures.activation_figure(
        x, {"relu": (x.clip(0), (x > 0) * 1.0), "tanh(relu)": (np.tanh(x.clip(0)), x * 0)}
    )
    values, derivatives = figure.axes
    assert np.array_equal(values.lines[0].get_ydata(), x.clip(0))
    assert np.array_equal(derivatives.lines[0].get_ydata(), (x > 0) * 1.0)
    assert legend(figure) == ["relu", "tanh(relu)"]


def test_training_curves_of_one_sae_show_every_bin(training_rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    rows = training_rows_of(30)
    figure = figures.training_curves([("relu", rows)], "context 128")
    loss, l0, fvu, bias = figure.axes
    assert np.array_equal(loss.lines[0].get_xdata(), [row["tokens"] for row in rows])
    assert np.array_equal(l0.lines[0].get_ydata(), [row["l0_ns"] for row in rows])
    assert np.array_equal(fvu.lines[0].get_ydata(), [row["fvu_ns"] for row in rows])
    named = {line.get_label(): line for line in bias.lines}
    assert np.array_equal(named["sinks"].get_ydata(), [row["bias_ratio"][0] for row in rows])
    assert np.array_equal(named["bin 9 (highest norms)"].get_ydata(), [row["bias_ratio"][10] for row in rows])
    assert "context 128" in texts(figure)


def test_training_curves_leave_gaps_for_null(training_rows_of: Callable[..., list[dict[str, Any]]]) -> None:
    rows = training_rows_of(5, sinks=False)
    rows[2] = {**rows[2], "fvu_ns": None, "bias_ratio": None}
    many = figures.training_curves([(f"sae {place}", rows) for place in range(9)])
    assert np.isnan(np.asarray(many.axes[2].lines[0].get_ydata())[2])
    assert len(legend(many)) == 9
    looks = {(line.get_color(), str(line.get_linestyle())) for line in many.axes[0].lines}
    assert len(looks) == 9
    figures.png_bytes(figures.training_curves([("empty", [])]))


def test_files_are_whole_deterministic_and_clean(norms_of: Make, top_norms_of: Make, tmp_path: Path) -> None:
    artifact, arrays = norms_of(3)
    top_norms, rows = top_norms_of(rows=5_000)

    def draw() -> list[Figure]:
        return [
            figures.norm_heatmap(artifact, arrays["counts"], arrays["edges"]),
            figures.l1_histogram(rows, top_norms),
        ]

    for number, figure in enumerate(draw()):
        path = tmp_path / f"{number}.png"
        figures.save_png(figure, path)
        width, height = figure.get_size_inches() * DPI
        with Image.open(path) as image:
            image.load()
            assert image.size == (int(width), int(height))
            assert set(image.info) <= {"dpi"}
            assert len(image.convert("L").getcolors() or []) > 5
    again = draw()
    assert [(tmp_path / f"{number}.png").read_bytes() for number in range(2)] == [
        figures.png_bytes(one) for one in again
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_a_figure_ignores_and_keeps_the_users_settings() -> None:
    x = np.linspace(-1, 1, 5)
    plain = figures.png_bytes(figures.activation_figure(x, {"relu": (x, x)}))
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 30, "axes.facecolor": "red"}):
        assert figures.png_bytes(figures.activation_figure(x, {"relu": (x, x)})) == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_the_room_needs_neither_torch_nor_pyplot_and_tables_no_matplotlib() -> None:
    code = (
        "import sys, nsae_cli.report.tables; assert 'matplotlib' not in sys.modules; import nsae_cli.report.figures; "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr


def test_a_name_outside_the_font_or_with_dollars_is_drawn(top_norms_of: Make) -> None:
    artifact, arrays = top_norms_of(rows=2_000)
    figure = figures.l0_histogram(arrays, {**artifact, "sae": {"name": "模型-$x_1$-" + "long" * 60}})
    with Image.open(io.BytesIO(figures.png_bytes(figure))) as image:
        image.verify()


def test_an_unwritable_folder_is_a_resource_error(tmp_path: Path) -> None:
    figure = figures.activation_figure(np.arange(3.0), {"relu": (np.arange(3.0), np.ones(3))})
    with pytest.raises(ResourceError, match=r"cannot write f\.png in .*missing"):
        figures.save_png(figure, tmp_path / "missing" / "f.png")


def test_every_drawn_text_lies_inside_the_figure(norms_of: Make, top_norms_of: Make) -> None:
    artifact, arrays = norms_of(1)
    top_norms, rows = top_norms_of(rows=2_000)
    for figure in (
        figures.norm_heatmap(artifact, arrays["counts"], arrays["edges"]),
        figures.l1_histogram(rows, top_norms),
        figures.compare_histograms([("a" * 70, rows, top_norms)] * 2, "l1"),
    ):
        figures.png_bytes(figure)
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
