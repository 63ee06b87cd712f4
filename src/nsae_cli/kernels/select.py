"""The one place that chooses a training step's kernel, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.types import StepResult

KERNELS = ("auto", "dense", "reference")


@dataclass(frozen=True)
class Choice:
    """A kernel, its name and the reason for it, for the log."""

    name: str
    step: Callable[..., StepResult]
    reason: str


def choose_step(requested: str, device: torch.device) -> Choice:
    """The kernel of a training step.

    Args:
        requested: ``auto``, ``dense`` or ``reference``.
        device: where the training runs. On CUDA the dense kernel multiplies in bfloat16 with float32 master weights.
    """
    if requested == "reference":
        return Choice("reference", step_gradients, "asked for; plain autograd")
    if device.type == "cuda":
        return Choice("dense", DenseStep(torch.bfloat16), "CUDA: bf16 products, fp32 master weights")
    return Choice("dense", DenseStep(), f"{device.type}: fp32, closed-form gradients")
