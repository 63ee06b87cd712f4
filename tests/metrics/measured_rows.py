"""Rows to measure: a mixture of ordinary tokens and sinks with an imperfect reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nsae_cli.metrics.groups import SINKS


@dataclass
class Rows:
    """The arguments of `ReconstructionAccumulator.update`, in its order."""

    x: Tensor
    x_hat: Tensor
    norm: Tensor
    group: Tensor
    l0: Tensor
    l1: Tensor
    penalty: Tensor

    def take(self, index: Tensor | slice) -> Rows:
        return Rows(*(getattr(self, field.name)[index] for field in fields(self)))

    def arguments(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def make_rows(count: int = 60, d_in: int = 5, seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, d_in, generator=g, dtype=torch.float64) + 0.7
    group = torch.randint(0, SINKS, (count,), generator=g)
    group[::7] = SINKS
    x[::7] = 40 + torch.randn(len(x[::7]), d_in, generator=g, dtype=torch.float64)
    x_hat = 0.8 * x + 0.3 * torch.randn(count, d_in, generator=g, dtype=torch.float64)
    l1 = 5 * torch.rand(count, generator=g, dtype=torch.float64)
    return Rows(
        x=x,
        x_hat=x_hat,
        norm=x.norm(dim=1),
        group=group,
        l0=torch.randint(1, 30, (count,), generator=g),
        l1=l1,
        penalty=l1 * (1 + torch.rand(count, generator=g, dtype=torch.float64)),
    )
