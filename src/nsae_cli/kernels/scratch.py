"""Buffers that steps share, one set per thread: memory that is paged in once, not at every step."""

from __future__ import annotations

import threading

import torch

_local = threading.local()


def buffer(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uninitialised [rows, width], valid until the same thread asks for the same name again.

    The memory is kept and grows to the largest size asked for, so that cells of several widths share it.
    """
    size = rows * width
    buffers: dict[str, torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    held = buffers.get(name)
    if held is None or held.numel() < size or held.dtype != dtype or held.device != torch.device(device):
        held = buffers[name] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(rows, width)


def clear() -> None:
    """Frees the calling thread's buffers: its work is done."""
    _local.__dict__.clear()
