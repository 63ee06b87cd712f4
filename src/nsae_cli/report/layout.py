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
        sections: row numbers after which a gap is left.
        repeated: how many of the keys, from the left, later blocks repeat; None for all.
    """

    keys: Sequence[Column]
    groups: Sequence[Sequence[Column]]
    title: str = ""
    note: str = ""
    sections: frozenset[int] = field(default_factory=frozenset)
    repeated: int | None = None

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
        blocks = self._blocks(console, options)
        return [self._table(block, 2, first=number == 0) for number, block in enumerate(blocks)]

    def _fits(
        self, columns: Sequence[Column], gap: int, console: Console, options: ConsoleOptions, *, first: bool = True
    ) -> bool:
        unlimited = options.update_width(10_000)
        return Measurement.get(console, unlimited, self._table(columns, gap, first=first)).maximum <= options.max_width

    def _blocks(self, console: Console, options: ConsoleOptions) -> Iterator[list[Column]]:
        block: list[Column] = []
        first = True
        for group in self.groups:
            together = self._fits(group, 2, console, options, first=False)
            for part in [list(group)] if together else [[column] for column in group]:
                if block and not self._fits([*block, *part], 2, console, options, first=first):
                    yield block
                    block, first = [], False
                block += part
        if block:
            yield block

    def _table(self, columns: Sequence[Column], gap: int, *, first: bool = True) -> Table:
        # The box itself leaves one space between columns.
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold"
        )
        keys = self.keys if first else self.keys[: self.repeated]
        every = [*keys, *columns]
        for place, column in enumerate(every):
            left = column.left or place < len(keys)
            table.add_column(Text(column.heading), justify="left" if left else "right", no_wrap=True, vertical="bottom")
        for row in range(len(every[0].cells) if every else 0):
            table.add_row(*[Text(column.cells[row]) for column in every], end_section=row in self.sections)
        return table
