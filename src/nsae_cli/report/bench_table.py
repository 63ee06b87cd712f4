"""The measurements of `nsae bench` as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def bench_table(result: Mapping[str, Any]) -> RenderableType:
    """Steps side by side, or the cross-overs of a calibration."""
    table = _crossovers(result) if "crossovers" in result else _sides(result)
    return Group(table, Text(str(result["machine"]), style="dim"))


def _sides(result: Mapping[str, Any]) -> Table:
    shape = result["shape"]
    table = Table(
        title=f"One training step: d_in {shape['d_in']:,}, d_sae {shape['d_sae']:,}, {shape['batch_size']:,} rows",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("", overflow="fold")
    for heading in ("L0", "ms", "p20 – p80", "rows/s", "× autograd"):
        table.add_column(heading, justify="right", no_wrap=True)
    for side in result["sides"]:
        table.add_row(
            side["side"],
            "" if side["l0"] is None else f"{side['l0']:.1f}",
            _ms(side["median_s"]),
            f"{_ms(side['p20_s'])} – {_ms(side['p80_s'])}",
            f"{side['rows_per_second']:,.0f}",
            f"{side['times_as_fast_as_autograd']:.2f}",
        )
    return table


def _crossovers(result: Mapping[str, Any]) -> Table:
    table = Table(title="Dense step's time ÷ sparse step's, by density", title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("d_sae", justify="right")
    densities = list(result["crossovers"][0]["dense_over_sparse"])
    for density in densities:
        table.add_column(f"{float(density):.0%}", justify="right", no_wrap=True)
    table.add_column("cross-over", justify="right", no_wrap=True)
    for row in result["crossovers"]:
        ratios = [f"{row['dense_over_sparse'][density]:.1f}" for density in densities]
        table.add_row(row["kernel"].removeprefix("nsae "), f"{row['d_sae']:,}", *ratios, f"{row['crossover']:.1%}")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
