"""A table that stays readable at any width: columns that do not fit go to a second block below, keys repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """One column: its heading (lines separated by ``\\n``) and its cells, already formatted."""

    heading: str
    cells: Sequence[str]
    left: bool = False


@dataclass(frozen=True)
class WideTable:
    """Rows under key columns and groups of value columns.

    A group is never torn apart unless it alone is wider than the terminal. Cells are never wrapped or shortened
    while one key and one value fit side by side.

    Args:
        keys: the columns that name a row, repeated in every block.
        groups: value columns that are read together.
        title: one line above, bold; may be empty.
        note: lines below, dim; may be empty.
        sections: row numbers after which a rule is drawn.
    """

    keys: Sequence[Column]
    groups: Sequence[Sequence[Column]]
    title: str = ""
    note: str = ""
    sections: frozenset[int] = field(default_factory=frozenset)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        for number, table in enumerate(self._tables(console, options)):
            if number:
                yield Text("")
            yield table
        if self.note:
            yield Text(self.note, style="dim")

    def _tables(self, console: Console, options: ConsoleOptions) -> list[Table]:
        """One table if need be with narrower gaps, else blocks."""
        every = [column for group in self.groups for column in group]
        for gap in (2, 1):
            if self._fits(every, gap, console, options):
                return [self._table(every, gap)]
        return [self._table(block, 2) for block in self._blocks(console, options)]

    def _fits(self, columns: Sequence[Column], gap: int, console: Console, options: ConsoleOptions) -> bool:
        unlimited = options.update_width(10_000)
        return Measurement.get(console, unlimited, self._table(columns, gap)).maximum <= options.max_width

    def _blocks(self, console: Console, options: ConsoleOptions) -> Iterator[list[Column]]:
        block: list[Column] = []
        for group in self.groups:
            if block and not self._fits([*block, *group], 2, console, options):
                yield block
                block = []
            if self._fits(group, 2, console, options):
                block += group
                continue
            for column in group:
                if block and not self._fits([*block, column], 2, console, options):
                    yield block
                    block = []
                block.append(column)
        if block:
            yield block

    def _table(self, columns: Sequence[Column], gap: int) -> Table:
        # The box itself leaves one space between columns.
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold"
        )
        every = [*self.keys, *columns]
        for place, column in enumerate(every):
            left = column.left or place < len(self.keys)
            table.add_column(Text(column.heading), justify="left" if left else "right", no_wrap=True, vertical="bottom")
        for row in range(len(every[0].cells) if every else 0):
            table.add_row(*[Text(column.cells[row]) for column in every], end_section=row in self.sections)
        return table
