"""Which context each row of a store belongs to, and which contexts are held out from training.

A context begins where position ≠ previous position + 1. Contexts are numbered through the store from 0; those whose
number mod 20 is 19 are held out, the same for every SAE. A store without positions is cut into blocks of 128 rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsae_cli.store.shards import ActivationStore

HELD_OUT_EVERY = 20
BLOCK_ROWS = 128


@dataclass(frozen=True)
class _ShardStart:
    """Number of the context that the shard's first row belongs to, and the position before that row."""

    context: int
    previous_position: int | None
    row: int


class Contexts:
    """Numbers a store's contexts; built by one pass over the positions (4 bytes a row)."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self._starts: list[_ShardStart] = []
        context, previous, row = -1, None, 0
        for shard, entry in enumerate(store.manifest.shards):
            self._starts.append(_ShardStart(context, previous, row))
            positions = store.positions(shard)
            if positions is not None and entry.rows:
                context += int(_begins(positions, previous).sum())
                previous = int(positions[-1])
            row += entry.rows
        self.total = context + 1 if store.has_positions else -(-row // BLOCK_ROWS)

    def ids(self, shard: int) -> torch.Tensor:
        """Context number of each row of a shard, int64 [rows]."""
        start = self._starts[shard]
        positions = self._store.positions(shard)
        if positions is None:
            return torch.arange(start.row, start.row + self._store.manifest.shards[shard].rows) // BLOCK_ROWS
        return start.context + _begins(positions, start.previous_position).long().cumsum(0)

    def held_out(self, shard: int) -> torch.Tensor:
        """Which rows of a shard are never trained on, bool [rows]."""
        return self.ids(shard) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _begins(positions: torch.Tensor, previous: int | None) -> torch.Tensor:
    if not len(positions):
        return torch.zeros(0, dtype=torch.bool)
    before = torch.empty_like(positions)
    before[1:] = positions[:-1]
    # The store's first row begins a context whatever its position is.
    before[0] = positions[0] if previous is None else previous
    return positions != before + 1
