"""What every benchmark writes beside its numbers: the device's name, percentiles, rows of a CSV file."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    """The device's name for the table; never the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model} ({os.cpu_count()} cores)"


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    low, *_, high = statistics.quantiles(values, n=5) if len(values) > 1 else (values[0], values[0])
    return statistics.median(values), low, high


def append_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Appends rows to a CSV file; the first row's keys are the header of a new file, and have to be an old one's."""
    rows = list(rows)
    columns = list(rows[0])
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != columns:
            raise SystemExit(f"{path} has other columns ({', '.join(header)}); move it away to begin a new one")
        new = False
    else:
        new = True
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
