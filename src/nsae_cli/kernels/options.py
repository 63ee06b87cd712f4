"""The kernel options' values; without torch's kernels, since `--help` and configurations need no more."""

from __future__ import annotations

from typing import Literal

KernelOption = Literal["auto", "dense", "sparse"]
PrecisionOption = Literal["auto", "fp32", "certified"]
