"""What `nsae verify` found: a line per artifact, and below it every finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {"ok": "green", "unfinished": "yellow", "repaired": "yellow", "damaged": "red", "note": "dim"}


def verify_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The artifacts with their states, then every finding and what --repair did.

    Args:
        rows: {kind, name, state, findings [{level, file, text}], repaired [sentences]} each.
    """
    if not rows:
        return Text("The workspace is empty.")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("kind", "name", "state", "what"):
        table.add_column(heading, no_wrap=heading != "what", overflow="fold")
    for row in rows:
        state = str(row["state"])
        table.add_row(row["kind"], Text(row["name"]), Text(state, style=_STYLES[state]), Text(_summary(row)))
    lines = [line for row in rows for line in _details(row)]
    return Group(table, Text(""), *lines) if lines else table


def _summary(row: Mapping[str, Any]) -> str:
    """``3 damaged, 1 note``; what was found, where it is one thing."""
    findings = row["findings"]
    if len(findings) == 1 and findings[0]["level"] == "unfinished":
        return str(findings[0]["text"])
    counts = {level: sum(finding["level"] == level for finding in findings) for level in ("damaged", "note")}
    parts = [f"{counts['damaged']} damaged"] if counts["damaged"] else []
    if counts["note"]:
        parts.append("1 note" if counts["note"] == 1 else f"{counts['note']} notes")
    return ", ".join(parts)


def _details(row: Mapping[str, Any]) -> list[Text]:
    findings = row["findings"]
    lines = []
    for finding in findings:
        level = str(finding["level"])
        where = f"{finding['file']}: " if finding["file"] else ""
        lines.append(Text.assemble("  ", (level, _STYLES[level]), f"  {where}{finding['text']}", overflow="fold"))
    lines += [Text.assemble("  ", ("repair", "bold"), f"  {sentence}", overflow="fold") for sentence in row["repaired"]]
    return [Text(f"{row['kind']}/{row['name']}", style="bold"), *lines] if lines else []
