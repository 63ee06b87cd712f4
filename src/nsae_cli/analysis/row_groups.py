"""Rows by norm (top, other, bottom) and by place (position 0, other special token, ordinary)."""

from __future__ import annotations

import numpy as np
import torch

BOTTOM, OTHER, TOP = range(3)
ORDINARY, SPECIAL, POSITION0 = range(3)
GROUPS = {"top": TOP, "other": OTHER, "bottom": BOTTOM}
KINDS = {"position0": POSITION0, "special": SPECIAL, "ordinary": ORDINARY}


def group_by_norm(norm: torch.Tensor, top: float) -> torch.Tensor:
    """0 bottom, 1 other, 2 top, int64 [rows]: k = max(1, round(top·rows)) rows at either end.

    Equal norms are ordered by row number; where the ends would overlap, top wins.
    """
    rows = len(norm)
    k = max(1, round(top * rows))
    order = norm.argsort(stable=True)
    group = torch.full((rows,), OTHER, dtype=torch.int64)
    group[order[:k]] = BOTTOM
    group[order[-k:]] = TOP
    return group


def kind_of(token: torch.Tensor, position: torch.Tensor, special_token_ids: list[int]) -> torch.Tensor:
    """0 ordinary, 1 other special token, 2 position 0, int64 [rows]; token and position are −1 where unknown."""
    special = torch.isin(token, torch.tensor(special_token_ids, dtype=torch.int64))
    kind = torch.where(special, SPECIAL, ORDINARY)
    return torch.where(position == 0, POSITION0, kind)


def distribution(values: torch.Tensor) -> dict[str, float | None]:
    """{mean, median, p5, p95}, all None without values."""
    if not len(values):
        return {"mean": None, "median": None, "p5": None, "p95": None}
    values = values.double()
    # numpy's, since torch.quantile refuses more than 16 million values.
    median, p5, p95 = np.quantile(values.numpy(), [0.5, 0.05, 0.95]).tolist()
    return {"mean": float(values.mean()), "median": median, "p5": p5, "p95": p95}
