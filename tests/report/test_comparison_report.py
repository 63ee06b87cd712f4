"""The comparison's page, table and figures, from a table.json written by hand."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from nsae_cli.report import comparison_text as text
from nsae_cli.report.comparison_figures import _look
from nsae_cli.report.comparison_markdown import comparison_markdown
from nsae_cli.report.figures import comparison_differences, comparison_fronts, png_bytes
from nsae_cli.report.tables import comparison_table


def _cell(*values: float | None) -> dict[str, Any]:
    given = [value for value in values if value is not None]
    mean = sum(given) / len(given) if given else None
    by_seed = {str(seed): value for seed, value in enumerate(values)}
    return {"mean": mean, "sd": 0.004 if len(given) > 1 else None, "by_seed": by_seed}


def _row(arm: str, l0: float, fvu: float, comparisons: list[dict[str, Any]], target: str = "8") -> dict[str, Any]:
    metrics = {name: _cell(None, None) for name, _, _ in text.COLUMNS}
    metrics |= {"l0_ns": _cell(l0, l0), "fvu_p0_ns": _cell(fvu, fvu + 0.004), "mre_ns": _cell(fvu, fvu)}
    metrics["dead_fraction"] = _cell(0.012, 0.014)
    return {"arm": arm, "level": target, "seeds": [0, 1], "saes": [], "metrics": metrics, "comparisons": comparisons}


def _difference(value: float, relative: float | None, mark: str, reason: str = "") -> dict[str, Any]:
    return {
        "difference": value,
        "relative": relative,
        "seeds": 2,
        "t_interval": {"low": value - 0.01, "high": value + 0.01},
        "bootstrap": {"difference": value, "interval": {"low": value - 0.002, "high": value + 0.002}},
        "margin": 0.004,
        "mark": mark,
        "reason": reason,
    }


def _compared(status: str, **metrics: Any) -> dict[str, Any]:
    return {
        "with": "relu p=0", "kind": "p=0", "status": status, "common_seeds": [0, 1], "seeds": [0, 1],
        "l0_ns": 8.5, "l0_ns_with": 8.0, "metrics": metrics,
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    better = _compared("matched", fvu_p0_ns=_difference(-0.02, -0.1, "better"), delta_ce_ns=None, mre_ns=None,
                       nbi=_difference(0.4, None, "undecided", "the interval over seeds holds 0"))  # fmt: skip
    group = {
        "label": "a|b <script>, blocks.2.hook_resid_post, sinks kept",
        "data": "a|b <script>", "hook": "blocks.2.hook_resid_post", "sinks": "keep", "altered": None,
        "model": "mini", "embedded_note": None, "context_size": 128, "packing": True, "bos": True,
        "rows": [
            _row("relu p=0", 8.0, 0.2, []),
            _row("relu p=2", 8.0, 0.18, [better]),
            _row("relu p=1", 8.5, 0.19, [_compared("unmatched L0")]),
        ],
        "matrix": [
            {"arm": f"relu p={p}", "level": "8", "l0_ns": 8.0, **{f"fvu_p{e}_ns": _cell(0.2 + 0.01 * abs(p - e))
             for e in range(3)}} for p in range(2)
        ],
    }  # fmt: skip
    return {
        "name": "t", "options": {"fvu_margin": 0.02, "ce_margin": 0.005, "baseline": None, "evals": None},
        "groups": [group], "conclusion": ["One <b>sentence</b>."], "notes": ["A note."],
        "figures": ["fronts.png"],
        "missed_l0": [{"sae": "g/x", "arm": "relu p=1", "seed": 0, "target_l0": 8.0, "l0_ns": 8.5,
                       "why": "too | short"}],
        "predictions": [
            {"id": "P1", "statement": "a < b", "verdict": "confirmed", "no_data": False, "evidence": ["1 < 2."],
             "clauses": {"confirmed": 2, "refuted": 0, "undecided": 0}, "needs": []},
            {"id": "P2", "statement": "c", "verdict": "undecided", "no_data": True, "evidence": [],
             "clauses": {"confirmed": 0, "refuted": 0, "undecided": 0}, "needs": ["an SAE"]},
        ],
    }  # fmt: skip


def test_page(document: dict[str, Any]) -> None:
    page = comparison_markdown(document)
    lines = page.splitlines()
    assert "| relu p=2 | relu p=0 | 8 | 2 | FVU ns | −10 % | [−15, −5.0] | [−11, −9.0] | **better** |" in lines
    slope = "|  |  |  | 2 | nbi | +0.40 | [+0.39, +0.41] | [+0.40, +0.40] "
    assert f"{slope}| **undecided**: the interval over seeds holds 0 |" in lines
    assert "| relu p=1 | relu p=0 | 8 | 0 |  |  |  |  | unmatched L0 (8.50 vs 8.00) |" in lines
    assert "| relu p=0 | 8 | 8.00 ± 0.00 | 0.202 ± 0.004 | 0.200 ± 0.004 | 1.30 ± 0.40 % | 2 |" in lines
    assert "| relu p=1 | 8 | 8.00 | 0.210 | 0.200 | 0.210 |" in lines
    assert "| P1 | a &lt; b | **confirmed** |" in lines
    assert "| P2 | c | **undecided: no data** |" in lines
    assert "- Missing: an SAE." in lines
    assert "| g/x | relu p=1 | 0 | 8 | 8.50 | too \\| short |" in lines
    assert "<script>" not in page
    assert "<b>" not in page
    # Every row of a table has as many cells as its heading.
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            columns = line.count("|")
            for row in lines[number - 1 :]:
                if not row.startswith("|"):
                    break
                assert row.replace("\\|", "").count("|") == columns, row


def test_terminal(document: dict[str, Any]) -> None:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(comparison_table(document))
    shown = console.export_text()
    assert "−10 % better" in shown
    assert "unmatched L0 (8.50 vs 8.00)" in shown
    assert "P1 confirmed (2 confirmed): a < b" in shown
    assert "P2" not in shown
    assert "g/x (relu p=1, seed 0): target 8, held-out L0 8.50: too | short" in shown


@pytest.mark.parametrize("empty", [False, True])
def test_figures_are_the_same_each_time(document: dict[str, Any], empty: bool) -> None:
    if empty:
        for row in document["groups"][0]["rows"]:
            row["metrics"] = {name: _cell(None, None) for name in row["metrics"]}
    for draw in (
        lambda: comparison_fronts(document),
        lambda: comparison_differences(document["groups"][0], document["options"]),
    ):
        first = png_bytes(draw())
        assert first.startswith(b"\x89PNG")
        assert png_bytes(draw()) == first


def test_panels_of_the_fronts(document: dict[str, Any]) -> None:
    document["groups"].append(copy.deepcopy(document["groups"][0]))
    figure = comparison_fronts(document)
    # Two groups; FVU and MRE were measured, ΔCE was not.
    assert len(figure.axes) == 4
    front = figure.axes[0]
    means = [line for line in front.lines if line.get_markersize() > 3]
    assert [value for line in means for value in line.get_ydata()] == pytest.approx([0.202, 0.182, 0.192])


def test_what_the_differences_show(document: dict[str, Any]) -> None:
    [axes] = comparison_differences(document["groups"][0], document["options"]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "relu p=2 − relu p=0, L0 8", "relu p=1 − relu p=0, L0 8"
    ]  # fmt: skip
    # In percent of the baseline, −.02 being −10 %.
    ends = {tuple(float(x) for x in line.get_xdata()) for line in axes.lines}
    assert any(pair == pytest.approx((-15, -5)) for pair in ends if len(pair) == 2)
    assert any(pair == pytest.approx((-11, -9)) for pair in ends if len(pair) == 2)
    assert "unmatched L0 (8.50 vs 8.00)" in [label.get_text() for label in axes.texts]


def test_arms_look_different_up_to_twenty() -> None:
    arms = [str(number) for number in range(20)]
    looks = {tuple(str(value) for value in _look(arms, arm).values()) for arm in arms}
    assert len(looks) == 20


def test_numbers() -> None:
    assert text.spread({"mean": -0.5, "sd": 0.0123}) == "−0.500 ± 0.012"
    assert text.spread({"mean": 0.02, "sd": None}, share=True) == "2.00 %"
    assert text.spread(None) == "–"
    assert (text.signed(0.0134), text.signed(-2.06), text.signed(0.0), text.signed(None)) == (
        "+0.013",
        "−2.1",
        "0",
        "–",
    )
    assert (text.signed(3e-5), text.signed(-3e-5)) == ("<0.0001", ">−0.0001")
