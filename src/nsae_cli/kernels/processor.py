"""What the processor calls itself; needs no torch, which may be what does not work."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """As /proc/cpuinfo names it, else as the platform does; may be empty."""
    lines = _cpuinfo()
    if lines is None:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def processor_flags() -> frozenset[str]:
    """Instruction sets and features by their names in /proc/cpuinfo; empty where there is none."""
    lines = _cpuinfo() or []
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())


def _cpuinfo() -> list[str] | None:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
