"""table.json of `nsae compare` for a page: a table per group, and what it concludes.

What a table lacks is left out: it may have been written by another version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsae_cli.report import format as fmt
from nsae_cli.report.page_sections import rounded

Json = dict[str, Any]
_MOST_COLUMNS = 40


def comparison_section(name: str, document: Any) -> Json | None:
    """{name, groups: [{label, columns, rows}], sentences}; None where there is no row.

    A cell is a text, a number, or [number to sort by, text to show].
    """
    if not isinstance(document, Mapping):
        return None
    groups = document.get("groups")
    if not isinstance(groups, list):
        groups = [document]
    found = [table for group in groups if isinstance(group, Mapping) if (table := _table(group)) is not None]
    if not found:
        return None
    conclusion = document.get("conclusion")
    predictions = [one for one in _list(document.get("predictions")) if isinstance(one, Mapping)]
    return {
        "name": name,
        "groups": found,
        "sentences": [str(sentence) for sentence in _list(conclusion)],
        "predictions": [
            f"{one.get('id')} {one.get('verdict')}: {one.get('statement')}"
            for one in predictions
            if one.get("verdict") and not one.get("no_data")
        ],
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _table(group: Mapping[str, Any]) -> Json | None:
    flat = [_flat(row) for row in _list(group.get("rows")) if isinstance(row, Mapping)]
    known = dict.fromkeys(key for row in flat for key in row)
    keys = [key for key in known if any(row.get(key) is not None for row in flat)][:_MOST_COLUMNS]
    if not keys:
        return None
    columns, cells = [], []
    for key in keys:
        values = [row.get(key) for row in flat]
        numbers = all(value is None or _is_number(value) or isinstance(value, list) for value in values)
        columns.append({"label": key.replace("_", " "), "help": key, "kind": "number" if numbers else "text"})
        cells.append([_cell(value, numbers) for value in values])
    return {
        "label": str(group.get("label") or ""),
        "columns": columns,
        "rows": [list(row) for row in zip(*cells, strict=True)],
    }


def _flat(row: Mapping[str, Any]) -> Json:
    """One value per column: metrics as mean ± sd, marks of the comparisons, nested keys joined."""
    found: Json = {}
    for key, value in row.items():
        if key == "metrics" and isinstance(value, Mapping):
            found |= {metric: _spread(spread) for metric, spread in value.items()}
        elif key == "comparisons":
            found |= _marks(_list(value))
        elif key == "seeds" and isinstance(value, list):
            found["seeds"] = len(value)
        elif key == "saes":
            continue
        elif isinstance(value, Mapping):
            found |= {f"{key} {inner}": _plain(one) for inner, one in value.items()}
        else:
            found[str(key)] = _plain(value)
    return found


def _spread(value: Any) -> Any:
    """[mean, "mean ± sd"] of {mean, sd}."""
    if not isinstance(value, Mapping):
        return _plain(value)
    mean, sd = value.get("mean"), value.get("sd")
    if not _is_number(mean):
        return None
    return [rounded(mean), fmt.number(mean) if not _is_number(sd) else f"{fmt.number(mean)} ± {fmt.number(sd, 2)}"]


def _marks(comparisons: list[Any]) -> Json:
    found: Json = {}
    for one in comparisons:
        if not isinstance(one, Mapping):
            continue
        other = str(one.get("with") or one.get("kind") or "another")
        metrics = one.get("metrics")
        if not metrics:
            found["compared with"] = f"{other}: {one.get('status')}"
            continue
        for metric, difference in metrics.items() if isinstance(metrics, Mapping) else ():
            if isinstance(difference, Mapping) and difference.get("mark"):
                found[f"{metric} against {one.get('kind') or other}"] = str(difference["mark"])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """A number, a short text or None."""
    if value is None or _is_number(value):
        return value
    if isinstance(value, list):
        return ", ".join(fmt.MISSING if part is None else str(part) for part in value[:20])
    return str(value)[:200]


def _cell(value: Any, numbers: bool) -> Any:
    if isinstance(value, list):
        return value
    if numbers:
        return rounded(value)
    return fmt.MISSING if value is None else fmt.plain(value) if isinstance(value, float) else str(value)
