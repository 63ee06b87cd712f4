"""table.json on a terminal: a block per group, then predictions and conclusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.report import comparison_text as text
from nsae_cli.report import format as fmt
from nsae_cli.report.layout import Column, WideTable

#: Sentences that are shown of those that speak against a prediction; all of them are in table.md.
_SHOWN_AGAINST = 2


def comparison_table(document: Mapping[str, Any]) -> RenderableType:
    """The table of every group, what missed its L0, the predictions with data, and the conclusion."""
    parts: list[RenderableType] = []
    for group in document["groups"]:
        parts += [_group_table(group), ""]
    parts.append(Text(text.LEGEND, style="dim"))
    parts += [Text(note, style="dim") for note in document["notes"]]
    if document["missed_l0"]:
        parts += ["", Text("Target L0 missed", style="bold")]
        parts += [Text(missed_line(entry)) for entry in document["missed_l0"]]
    checked = [prediction for prediction in document["predictions"] if not prediction["no_data"]]
    if checked:
        parts += ["", Text("Predictions", style="bold")]
        for prediction in checked:
            verdict = (f"{prediction['id']} {prediction['verdict']}", "bold")
            parts.append(Text.assemble(verdict, f" ({_tally(prediction)}): {prediction['statement']}", overflow="fold"))
            against = [sentence for sentence in prediction["evidence"] if sentence.endswith("(refuted).")]
            parts += [Text(f"  {sentence}") for sentence in against[:_SHOWN_AGAINST]]
    parts += ["", Text("Conclusion", style="bold"), *(Text(sentence) for sentence in document["conclusion"])]
    return Group(*parts)


def _tally(prediction: Mapping[str, Any]) -> str:
    """How many checks came out how, and whether some could not be made."""
    counted = ", ".join(f"{number} {verdict}" for verdict, number in prediction["clauses"].items() if number)
    return counted + ("; something is missing, see table.md" if prediction["needs"] else "")


def missed_line(entry: Mapping[str, Any]) -> str:
    """One SAE that missed its target."""
    return (
        f"{entry['sae']} ({entry['arm']}, seed {entry['seed']}): target {entry['target_l0']:g}, "
        f"held-out L0 {fmt.number(entry['l0_ns'])}: {entry['why']}"
    )


def _group_table(group: Mapping[str, Any]) -> RenderableType:
    rows: Sequence[Mapping[str, Any]] = group["rows"]
    keys = [
        Column("arm", [row["arm"] for row in rows]),
        Column("L0\ntarget", [row["level"] for row in rows]),
    ]
    present = {name for name, _, _ in text.present_columns(rows)}
    marked = {
        metric: [text.mark_cell(text.with_p0(row), metric) for row in rows] for metric in ("fvu_p0_ns", "delta_ce_ns")
    }
    groups = [[Column("seeds", [str(len(row["seeds"])) for row in rows])]]
    for name, heading, share in text.COLUMNS:
        if name not in present:
            continue
        # The spread of every column is in table.md; here it would cost three screens.
        cells = [row["metrics"][name] if name in marked else {"mean": row["metrics"][name]["mean"]} for row in rows]
        column = Column(heading.replace(" ", "\n"), [text.spread(cell, share) for cell in cells])
        block = [column]
        if name in marked and any(marked[name]):
            block.append(Column("against\np=0", marked[name], left=True))
        groups.append(block)
    levels = [row["level"] for row in rows]
    gaps = frozenset(i for i in range(len(rows) - 1) if levels[i] != levels[i + 1])
    title = " · ".join(part for part in (group["label"], fmt.source_line(group), text.usual(group)) if part)
    return WideTable(keys, groups, title=title, sections=gaps)
