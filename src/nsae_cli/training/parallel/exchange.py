"""What a dense step asks the processes that have other rows of its batch or other features of its SAE.

The choice of the largest entries is exact: every process offers its own candidates, all see all of them, and each takes
those of the chosen that are its own. Among equal ones the lower row, then the lower column comes first, as in one
process: ties are given away in the order of (part of the rows, row, part of the features, column).
"""

from __future__ import annotations

import torch

from nsae_cli.kernels.selection import BatchTopK, row_top_k
from nsae_cli.kernels.types import BatchChoice, StepResult
from nsae_cli.training.parallel.group import Group


class RanksExchange:
    """See `kernels.types.Exchange`.

    Args:
        data: processes with the same features.
        features: processes with the same rows.
        batch: all that have a part of the batch, ordered by rows, then by features.
    """

    def __init__(self, data: Group, features: Group, batch: Group) -> None:
        self._data, self._features, self._batch = data, features, batch

    @property
    def whole_rows(self) -> bool:
        return self._features.size == 1

    def add_features_(self, part: torch.Tensor) -> None:
        self._features.sum_(part)

    def any_feature(self, here: bool) -> bool:
        if self.whole_rows:
            return here
        told = torch.tensor([int(here)])
        self._features.most_(told)
        return bool(told)

    def row_top_k(self, z: torch.Tensor, k: int) -> torch.Tensor:
        if self.whole_rows:
            return row_top_k(z, k)
        candidates = z.new_full((len(z), k), -torch.inf)
        here = min(k, z.shape[1])
        candidates[:, :here] = torch.topk(z, here, dim=1).values
        offered = self._features.stack(candidates)  # [parts, rows, k]
        least = torch.topk(offered.transpose(0, 1).flatten(1), k, dim=1).values[:, -1:]
        room = k - (~(offered <= least)).sum(dim=(0, 2))
        # Counts of ties end at k a part, which leaves the parts after it nothing either way.
        room -= (offered[: self._features.rank] == least).sum(dim=(0, 2))
        chosen, ties = ~(z < least), z == least
        if bool((ties.sum(dim=1) > room).any()):
            chosen &= ~ties | (torch.cumsum(ties, dim=1) <= room[:, None])
        return chosen

    def batch_top_k(self, k: int, rows: int) -> BatchChoice:
        count = k * rows * self._data.size
        if self._batch.size == 1:
            return BatchTopK(count)
        return _BatchTopK(count, self._data, self._features, self._batch)

    def complete_(self, result: StepResult) -> None:
        if result.least_act is not None and self._batch.size > 1:
            result.least_act = result.least_act.clone()  # a scalar that the selection may hold too
            self._batch.least_(result.least_act)
        if self.whole_rows:
            return
        parts = [result.penalty, result.l0, result.l1]
        if (sums := result.row_gradients) is not None:
            # ‖g‖² is of x̂, which all have.
            parts += [sums.delta_sq, sums.acts_sq, sums.along_sq]
            parts += [part for part in (sums.norm_sq, sums.norm_cross) if part is not None]
        told = torch.stack(parts)
        self._features.sum_(told)
        for part, total in zip(parts, told, strict=True):
            part.copy_(total)


class _BatchTopK:
    """`selection.BatchTopK` over all rows and features.

    Args:
        count: how many are chosen of the whole batch.
        data, features, batch: see `RanksExchange`.
    """

    def __init__(self, count: int, data: Group, features: Group, batch: Group) -> None:
        self._count = count
        self._data, self._features, self._batch = data, features, batch
        self._best: torch.Tensor | None = None
        self._least: torch.Tensor | None = None
        self._room = torch.zeros(())  # for ties, in the rows that are still to come

    def offer(self, z: torch.Tensor) -> None:
        values = z.flatten() if self._best is None else torch.cat([self._best, z.flatten()])
        self._best = torch.topk(values, min(self._count, len(values)), sorted=False).values

    def choose(self, z: torch.Tensor) -> torch.Tensor:
        if self._least is None:
            self._least, self._room = self._among_all()
        ties = z == self._least
        by_row = self._features.stack(ties.sum(dim=1))  # [parts, rows]
        of_row = by_row.sum(dim=0)
        before = torch.cumsum(of_row, 0) - of_row + by_row[: self._features.rank].sum(dim=0)
        first = ties & (torch.cumsum(ties, dim=1) <= (self._room - before)[:, None])
        self._room = (self._room - of_row.sum()).clamp_min(0)
        return ~(z < self._least) & ~(ties & ~first)

    def _among_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least value that is chosen, and how many that equal it are among this process's rows."""
        assert self._best is not None
        offered = self._batch.stack(self._best)
        least = torch.topk(offered.flatten(), min(self._count, offered.numel())).values.min().clamp_min(0)
        # Ties that a part did not offer would come after `count` others of it: those after it get nothing either way.
        room = self._count - (offered > least).sum()
        of_rows = (offered == least).sum(dim=1).view(self._data.size, self._features.size).sum(dim=1)
        return least, (room - of_rows[: self._data.rank].sum()).clamp_min(0)
