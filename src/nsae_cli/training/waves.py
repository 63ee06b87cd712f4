"""How many SAEs of a grid train side by side: as many as fit into memory; the others follow in further waves.

Each wave is one pass over the same batches in the same order, so the waves change nothing but the time: cells do not
know of each other, and the order of the rows is a pure function of the seed and the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsae_cli.kernels.select import Choice
from nsae_cli.training.options import CellConfig

#: Share of the free memory that cells and rows may take; the rest is for buffers of the step and for everybody else.
_SHARE = 0.8


@dataclass(frozen=True)
class MemoryPlan:
    """What a run may take.

    Attributes:
        budget_bytes: for weights and mixed rows together; None where the free memory is not known.
        rows_bytes: of the rows that are mixed in memory.
        cell_bytes: by cell.
    """

    budget_bytes: int | None
    rows_bytes: int
    cell_bytes: Mapping[str, int]

    def next_wave(self, left: Sequence[str]) -> list[str]:
        """The first of the cells that are left, as many as fit, at least one."""
        if self.budget_bytes is None:
            return list(left)
        wave: list[str] = []
        taken = self.rows_bytes
        for cell in left:
            taken += self.cell_bytes[cell]
            if wave and taken > self.budget_bytes:
                break
            wave.append(cell)
        return wave

    def waves(self, left: Sequence[str]) -> list[list[str]]:
        """All waves, if memory stays as it is."""
        found = []
        rest = list(left)
        while rest:
            found.append(self.next_wave(rest))
            rest = rest[len(found[-1]) :]
        return found

    def describe(self, left: Sequence[str]) -> str:
        """Sizes and waves, for the line before the first step."""
        waves = self.waves(left)
        largest = max(sum(self.cell_bytes[cell] for cell in wave) for wave in waves)
        text = f"{size(self.rows_bytes)} of mixed rows, {size(largest)} of weights, gradients, Adam and a checkpoint"
        if self.budget_bytes is None:
            return text
        text += f"; up to {size(self.budget_bytes)} may be used"
        if len(waves) > 1:
            sizes = " + ".join(str(len(wave)) for wave in waves)
            text += f": {len(waves)} waves of {sizes} SAEs, a pass over the rows each"
        return text


def plan_memory(
    configs: Mapping[str, CellConfig], d_in: int, kernel: Choice, rows_bytes: int, most: int | None, parts: int = 1
) -> MemoryPlan:
    """Sizes of a run's parts.

    Args:
        configs: the cells.
        d_in: width of the rows.
        kernel: what they step with.
        rows_bytes: of the rows that are mixed in memory.
        most: ``--max-memory``; None takes a share of what is free.
        parts: into how many processes the features are cut; sizes are those of one.
    """
    if most is None:
        free = free_bytes(kernel.device)
        most = None if free is None else int(_SHARE * free)
    return MemoryPlan(
        most, rows_bytes, {name: cell_bytes(config, d_in, kernel) // parts for name, config in configs.items()}
    )


def cell_bytes(config: CellConfig, d_in: int, kernel: Choice) -> int:
    """Weights, Adam's two moments and gradients, 4 bytes a parameter each, and the encoder's bf16 copy.

    On the CPU also the copy of weights and moments from which a checkpoint is written.
    """
    weights = 2 * d_in * config.d_sae
    per_parameter = 16 if kernel.device.type == "cuda" else 28
    return per_parameter * (weights + config.d_sae + d_in) + (weights if kernel.certified else 0)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left; None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = [_available_in_system(), _left_in_cgroup()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _available_in_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _left_in_cgroup() -> int | None:
    """What the container's limit leaves; pages of files in memory count as used there, so this errs on the low side."""
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        return None if most == "max" else max(0, int(most) - used)
    except (OSError, ValueError):
        return None


def size(count: int) -> str:
    """Bytes for people, in the binary units that memory is sold in."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**33 else f"{count / 2**30:,.1f} GiB"
