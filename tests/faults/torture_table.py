"""The results of `make torture` as a table, between two marks in docs/reliability.md."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- results: begin (make torture) -->", "<!-- results: end -->"

#: The rows of the table: what results say was tried → words for it.
_ROWS = {
    "death at an operation": "killed at its 1st, 2nd, … operation on files until it ends unhit",
    "death while recovering from a death": "killed at an operation, run again and killed at another",
    "kill -9 at a random time": "kill -9 at a random time",
    "kill -9 at a random time while going on": "kill -9 at a random time, while going on from an earlier death",
    "2 × kill -9 at random times": "kill -9 at random times, twice in a row",
    "2 × kill -9 at random times while going on": "kill -9 at random times, twice in a row, while going on",
    "metrics.jsonl torn within its last line": "killed between two steps; metrics.jsonl cut at each byte of a line",
    "order: fsync, rename, fsync of the folder, mark": "every rename comes after its flush, every mark after its files",
    "power cut": "power cut (simulated: what was not flushed is lost in part)",
    "clock runs backwards": "the clock runs backwards; killed at an operation",
    "ENOSPC at an operation": "disk full from its 1st, 2nd, … operation on; and for one operation only",
    "EIO at fsync": "the disk fails at a flush (EIO)",
    "a read fails (EIO)": "the disk fails at a read (EIO)",
    "file system full": "workspace on a small file system that becomes full",
    "file size limit": "files may not grow beyond a limit (ulimit -f)",
    "two processes, one folder": "two processes started on one folder within 10 ms",
    "training on a store that is being collected": "training started on a store that is being collected",
    "a second signal 0-200 ms after the first": "a second signal 0 to 200 ms after the first",
    "stopped at a step and gone on": "stopped at each of 51 steps and gone on: weights, optimizer, metrics compared",
    "an item of a checkpoint dropped": "an item of a checkpoint is missing: refused",
    "an item of a checkpoint changed": "an item of a checkpoint has another value: the result differs, or refused",
    "a damaged or edited file is read": "files damaged or edited at random: refused, or the same values",
}


def read_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of all parts that have been run."""
    rows = []
    for path in sorted(results.glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _words(what: str) -> str:
    if " during " in what:
        sent, _, phase = what.partition(" during ")
        return f"{'a signal to the whole process group' if 'group' in sent else 'SIGINT, SIGTERM'} during {phase}"
    return _ROWS.get(what, what)


def table(results: Path) -> str:
    """A row per fault: the commands, trials, those in which every promise held, and what else was counted."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(results):
        groups[_words(row["what"])].append(row)
    order = {words: place for place, words in enumerate(_ROWS.values())}
    lines = ["| fault | commands | trials | held | counted on the way |", "|---|---|---:|---:|---|"]
    for words in sorted(groups, key=lambda words: (order.get(words, len(order)), words)):
        rows = groups[words]
        tried, held = (sum(row[key] for row in rows) for key in ("tried", "held"))
        stages = ", ".join(sorted({row["stage"] for row in rows}))
        lines.append(f"| {words} | {stages} | {tried:,} | {held:,} | {_counted(rows)} |")
    tried, held = (sum(row[key] for rows in groups.values() for row in rows) for key in ("tried", "held"))
    lines.append(f"| all | | {tried:,} | {held:,} | |")
    return "\n".join(lines)


def _counted(rows: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = defaultdict(int)
    most: dict[str, float] = {}
    for row in rows:
        for name, count in row["counts"].items():
            counts[name] = max(counts[name], count) if name == "kinds of items" else counts[name] + count
        for name, value in row["most"].items():
            most[name] = max(value, most.get(name, value))
    said = [f"{name} {count:,}" for name, count in counts.items() if count]
    said += [f"most {name} {value:.3g}" for name, value in most.items() if not name.startswith("nothing")]
    return "; ".join(said)


def write(results: Path, page: Path = PAGE) -> None:
    """Puts the table between the marks of the page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    commits = {json.loads(path.read_text(encoding="utf-8"))["commit"] for path in results.glob("*.json")}
    seconds = sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in results.glob("*.json"))
    said = f"Run at commit {', '.join(sorted(commits))}; {seconds / 60:.0f} minutes of one core."
    page.write_text(f"{before}{BEGIN}\n{said}\n\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "results")
