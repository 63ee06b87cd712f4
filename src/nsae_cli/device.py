"""Which device computes, and why."""

from __future__ import annotations

from typing import Literal

import torch

from nsae_cli.errors import ResourceError

DeviceOption = Literal["auto", "cpu", "cuda", "mps"]


def choose_device(option: DeviceOption) -> tuple[torch.device, str]:
    """The device of ``--device`` and the reason to print; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        ResourceError: the device asked for is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if option == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
        passed_over = [name.upper() for name in ("cuda", "mps") if not available[name]]
        why = f"no {' and no '.join(passed_over)}" if device == "cpu" else "the fastest that is there"
        return torch.device(device), f"{_describe(device)} (--device auto: {why})"
    if not available[option]:
        raise ResourceError(f"--device {option}: torch {torch.__version__} finds no such device here; use --device cpu")
    return torch.device(option), f"{_describe(option)} (--device {option})"


def _describe(device: str) -> str:
    if device == "cuda":
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu: {torch.get_num_threads()} threads" if device == "cpu" else device
