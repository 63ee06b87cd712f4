"""The findings of `nsae doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor_table(document: Mapping[str, Any]) -> RenderableType:
    """A line per check, its remedy below it; a summary at the end.

    Args:
        document: {sections: {section: {check: {state, found, remedy}}}, …}.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    states: Counter[str] = Counter()
    for section, checks in document["sections"].items():
        for number, (name, check) in enumerate(checks.items()):
            states[check["state"]] += 1
            found = Text(str(check["found"]))
            if check["remedy"]:
                found.append(f"\n→ {check['remedy']}", style="italic")
            state = Text(check["state"], style=_STYLES[check["state"]])
            table.add_row("" if number else section, name, state, found)
    return Group(table, Text(""), Text(_summary(states)))


def _summary(states: Counter[str]) -> str:
    parts = [_number(states[state], state) for state in ("problem", "note") if states[state]]
    return f"{states.total()} checks: {' and '.join(parts) if parts else 'all ok'}"


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
