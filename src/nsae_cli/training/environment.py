"""What the bits of a training run depend on beside its configuration: software, device and number of threads."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

import nsae_cli
from nsae_cli.training.parallel.mesh import ONE, Mesh

#: How many trained together, where it was more than one.
_PROCESSES = "processes"


def versions() -> dict[str, str]:
    """Versions that run.json records."""
    return {"nsae": nsae_cli.__version__, "torch": torch.__version__, "python": platform.python_version()}


def environment(device: torch.device, mesh: Mesh = ONE) -> dict[str, str | int]:
    """The versions, the device and, on the CPU, over how many threads sums are split. As it is now, inside the run."""
    found: dict[str, str | int] = dict(versions())
    if mesh.size > 1:
        found[_PROCESSES] = str(mesh)
    if device.type == "cpu":
        return found | {"device": "cpu", "threads": torch.get_num_threads()}
    return found | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def changes_of_environment(earlier: Any, now: Mapping[str, Any]) -> str | None:
    """``torch 2.13.0 -> 2.14.0, …``: in what the environment differs from an earlier one; None where it is unknown."""
    if not isinstance(earlier, Mapping):
        return None
    changed = [key for key, value in now.items() if key in earlier and earlier[key] != value and key != _PROCESSES]
    changes = [f"{key} {earlier[key]} -> {now[key]}" for key in changed]
    before, after = (str(one.get(_PROCESSES, ONE)) for one in (earlier, now))
    return ", ".join(changes if before == after else [f"{before} -> {after}", *changes]) or None
