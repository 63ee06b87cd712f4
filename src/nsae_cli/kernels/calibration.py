"""Cross-over densities: below them a sparse step is faster than a dense one.

Defaults were measured (docs/kernels.md says how and where); `nsae bench --calibrate` measures this machine's own and
keeps them in the user's cache folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nsae_cli.kernels.processor import processor_name

#: Density by kind of sparse step, at d_in 768, d_sae 6144, on a Zen 4 core. None for Triton's: it was timed on no
#: GPU yet, and dense steps stand in until this machine's own cross-over is measured.
DEFAULTS = {"native-certified": 0.2, "native-fp32": 0.2, "torch": 0.05}


@dataclass(frozen=True)
class Point:
    """A measured cross-over.

    Attributes:
        machine: see `machine`.
        kind: of the sparse step, see `select.Choice.kind`.
        d_in, d_sae: of the SAE.
        density: at which dense and sparse step take the same time.
    """

    machine: str
    kind: str
    d_in: int
    d_sae: int
    density: float


def machine(device: torch.device) -> str:
    """What a measurement depends on beside the SAE's shape: processor and threads, or GPU; torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
        return f"GPU {name}, torch {torch.__version__}"
    return f"{platform.machine()} {processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cache_file() -> Path:
    """Where measured cross-overs are kept: ``$XDG_CACHE_HOME/nsae`` or ``~/.cache/nsae``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nsae" / "crossovers.json"


def load_points() -> list[Point]:
    """All measured cross-overs; a file that is absent or damaged holds none."""
    try:
        points = [Point(**point) for point in json.loads(cache_file().read_text(encoding="utf-8"))]
        return [Point(str(p.machine), str(p.kind), int(p.d_in), int(p.d_sae), float(p.density)) for p in points]
    except (OSError, ValueError, TypeError, RuntimeError):  # RuntimeError: there is no home folder
        return []


def save_points(points: list[Point]) -> None:
    """Adds measurements; newer ones of the same machine, kind and shape replace older ones."""
    by_key = {(p.machine, p.kind, p.d_in, p.d_sae): p for p in [*load_points(), *points]}
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(point) for point in by_key.values()], indent=1), encoding="utf-8")
    temporary.replace(path)


def crossover(kind: str, device: torch.device, d_in: int, d_sae: int) -> float | None:
    """The cross-over density of a sparse step: the measurement nearest in size, else the default.

    Args:
        kind: a key of `DEFAULTS`, or Triton's, of which there may be neither default nor measurement: None.
        device: where the steps are taken.
        d_in, d_sae: of the SAE.
    """
    here = machine(device)
    points = [point for point in load_points() if (point.machine, point.kind) == (here, kind)]
    if not points:
        return DEFAULTS.get(kind)
    nearest = min(points, key=lambda p: abs(math.log(p.d_in * p.d_sae / (d_in * d_sae))))
    return nearest.density
