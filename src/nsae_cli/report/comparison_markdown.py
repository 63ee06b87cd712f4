"""table.json as a Markdown page: conclusion, predictions, table, differences, matrix, and what missed its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nsae_cli.report import comparison_text as text
from nsae_cli.report import format as fmt

_MARKS = (
    "Differences are paired by seed and only made at matched L0 (held-out non-sink L0 within 2 % of each other, or "
    "both within 2 % of the target). The first interval is over seeds (Student's t, 95 %), the second over held-out "
    "contexts (bootstrap of the mean over seeds, 1000 draws, 95 %). **better**, **worse** (**lower**, **higher** for "
    "nbi): both exclude 0 on the same side; **equivalent**: both lie inside the margin of "
)


def comparison_markdown(document: Mapping[str, Any]) -> str:
    """The page."""
    return "\n".join([*_page(document), ""])


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_escaped(document['name'])}"
    yield from ("", "Made by `nsae compare`; the same numbers are in table.json.", "", "## Conclusion", "")
    yield from (f"- {_escaped(sentence)}" for sentence in document["conclusion"])
    yield from (f"- Note: {_escaped(note)}" for note in document["notes"])
    yield from _predictions(document["predictions"])
    yield from ("", "## Table", "", _escaped(text.LEGEND))
    for group in document["groups"]:
        yield from _group(group)
    options = document["options"]
    yield from ("", "## Differences", "")
    yield (
        f"{_MARKS}{fmt.plain_percent(options['fvu_margin'])} (FVU, MRE) or {options['ce_margin']:g} nats (ΔCE); "
        "**undecided** otherwise."
    )
    for group in document["groups"]:
        yield from _differences(group)
    yield from _by_bin(document["groups"])
    yield from _matrices(document["groups"])
    yield from _missed(document["missed_l0"])
    yield from ("", "## Figures", "")
    yield from (f"![{figure}]({figure})" for figure in document["figures"])


def _predictions(predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", "## Predictions", "", "| | prediction | verdict |", "|---|---|---|")
    for prediction in predictions:
        verdict = "undecided: no data" if prediction["no_data"] else prediction["verdict"]
        yield f"| {prediction['id']} | {_cell(prediction['statement'])} | **{verdict}** |"
    for prediction in predictions:
        if prediction["evidence"] or prediction["needs"]:
            yield from ("", f"**{prediction['id']}**", "")
            yield from (f"- {_escaped(sentence)}" for sentence in prediction["evidence"])
            yield from (f"- Missing: {_escaped(need)}." for need in prediction["needs"])


def _group(group: Mapping[str, Any]) -> Iterator[str]:
    rows = group["rows"]
    columns = text.present_columns(rows)
    source = "; ".join(part for part in (fmt.source_line(group), text.usual(group)) if part)
    yield from ("", f"### {_escaped(group['label'])}", "", f"{_escaped(source)}.", "")
    headings = ["arm", "target", *(heading for _, heading, _ in columns), "seeds"]
    yield _line(headings)
    yield "|" + "---|" * len(headings)
    for row in rows:
        cells = [text.spread(row["metrics"][name], share) for name, _, share in columns]
        yield _line([row["arm"], row["level"], *cells, str(len(row["seeds"]))])


def _differences(group: Mapping[str, Any]) -> Iterator[str]:
    if not any(row["comparisons"] for row in group["rows"]):
        return
    yield from ("", f"### {_escaped(group['label'])}", "")
    headings = ["arm", "with", "target", "seeds", "in", "difference", "over seeds", "over contexts", "mark"]
    yield _line(headings)
    yield "|" + "---|" * len(headings)
    for row in group["rows"]:
        for compared in row["comparisons"]:
            names = [row["arm"], compared["with"], row["level"]]
            if compared["status"] != "matched":
                yield _line([*names, "0", "", "", "", "", text.unmatched(compared)])
                continue
            for metric, heading in text.COMPARED:
                entry = compared["metrics"].get(metric)
                if entry is not None:
                    yield _line([*names, str(entry["seeds"]), heading, *_difference(metric, entry)])
                    names = ["", "", ""]


def _difference(metric: str, entry: Mapping[str, Any]) -> list[str]:
    percent = text.in_percent(metric, entry)
    scale = 1.0 if percent is None else percent
    resampled = (entry["bootstrap"] or {}).get("interval")
    mark = f"**{entry['mark']}**" + (f": {entry['reason']}" if entry["reason"] else "")
    return [
        text.difference(metric, entry),
        text.interval(entry["t_interval"], scale),
        text.interval(resampled, scale),
        mark,
    ]


def _by_bin(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    shown = [(group, [row for row in group["rows"] if row.get("delta_ce_by_bin")]) for group in groups]
    shown = [(group, rows) for group, rows in shown if rows]
    if not shown:
        return
    yield from ("", "## ΔCE by norm bin", "")
    yield (
        "Added cross-entropy per spliced token (millinats) with the reconstruction in place of one norm bin's tokens "
        "only, 0 the shortest, 9 the longest; mean over seeds."
    )
    for group, rows in shown:
        yield from ("", f"### {_escaped(group['label'])}", "")
        headings = ["arm", "target", *map(str, range(10)), "sinks"]
        yield _line(headings)
        yield "|" + "---|" * len(headings)
        for row in rows:
            means = [part["mean"] for part in row["delta_ce_by_bin"]]
            cells = [fmt.MISSING if mean is None else fmt.number(1000 * mean, 3) for mean in means]
            yield _line([row["arm"], row["level"], *cells])


def _matrices(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    groups = [group for group in groups if len(group["matrix"]) > 1]
    if not groups:
        return
    yield from ("", "## Trained with p, evaluated with p", "")
    yield "Unexplained share of the variance of non-sink tokens, every token weighted with n^(−p)."
    for group in groups:
        yield from ("", f"### {_escaped(group['label'])}", "")
        yield _line(["trained", "target", "L0 ns", "evaluated p=0", "p=1", "p=2"])
        yield "|---|---|---|---|---|---|"
        for line in group["matrix"]:
            cells = [text.spread(line[key]) for key in ("fvu_p0_ns", "fvu_p1_ns", "fvu_p2_ns")]
            yield _line([line["arm"], line["level"], fmt.number(line["l0_ns"]), *cells])


def _missed(missed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("", "## Target L0 missed by more than 2 %", "")
    if not missed:
        yield "None."
        return
    yield _line(["SAE", "arm", "seed", "target", "held-out L0", "why"])
    yield "|---|---|---|---|---|---|"
    for entry in missed:
        cells = [entry["sae"], entry["arm"], str(entry["seed"]), f"{entry['target_l0']:g}", fmt.number(entry["l0_ns"])]
        yield _line([*cells, entry["why"]])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: str) -> str:
    return _escaped(value).replace("|", "\\|").replace("\n", " ")


def _escaped(value: str) -> str:
    """Text that is no HTML, and whose stars and underscores of names stay as they are where Markdown reads them so."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|endoftext|", "\\|endoftext\\|")
