"""What lies in the workspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nsae_cli.report import format as fmt

_STATUS_STYLE = {"complete": "green", "unfinished": "yellow", "running": "yellow", "corrupt": "red", "damaged": "red"}


def workspace_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per artifact. Names are never shortened, since they are copied into commands.

    Args:
        rows: {kind, name, status, size (bytes, or text), detail} each, in the order to be shown.
    """
    if not rows:
        return Text("The workspace is empty.")
    return _Workspace(rows)


@dataclass(frozen=True)
class _Workspace:
    rows: Sequence[Mapping[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        if Measurement.get(console, options.update_width(10_000), table).maximum <= options.max_width:
            yield table
            return
        # Too narrow for columns: the name on a line of its own, whole, and everything else below it.
        for row in self.rows:
            kind, name, status, size, detail = _cells(row)
            yield Text.assemble(kind, " ", (name.plain, "bold"), overflow="fold")
            rest = Text.assemble(status, " · ", size, *((" · ", detail) if detail.plain else ()))
            yield Padding(rest, (0, 0, 0, 2))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for heading in ("kind", "name", "status", "size", "detail"):
            table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row))
        return table


def _cells(row: Mapping[str, Any]) -> tuple[Text, Text, Text, Text, Text]:
    status = str(row.get("status") or fmt.MISSING)
    return (
        Text(str(row.get("kind") or fmt.MISSING)),
        Text(str(row.get("name") or fmt.MISSING)),
        Text(status, style=_STATUS_STYLE.get(status, "")),
        Text(fmt.size_in_bytes(row.get("size"))),
        Text(str(row.get("detail") or "")),
    )
