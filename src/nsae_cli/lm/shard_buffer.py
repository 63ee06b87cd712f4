"""Gathers harvested batches into one shard."""

from __future__ import annotations

import torch
from torch import Tensor

from nsae_cli.lm.harvest import HarvestedBatch


class ShardBuffer:
    """Room for the rows of a fixed number of contexts, allocated once per shard.

    Args:
        contexts: per full shard; the batches added end exactly there.
        context: most rows of a context.
    """

    def __init__(self, contexts: int, context: int) -> None:
        self._contexts = contexts
        self._capacity = contexts * context
        self._tensors: dict[str, Tensor] = {}
        self._held_contexts = 0
        self._rows = 0

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last `take`."""
        return self._held_contexts == 0

    @property
    def full(self) -> bool:
        """Whether the shard is to be written."""
        return self._held_contexts == self._contexts

    def add(self, batch: HarvestedBatch) -> None:
        """Copies a batch's rows behind those that are here."""
        for name, rows in batch.row_tensors().items():
            if name not in self._tensors:
                self._tensors[name] = torch.empty((self._capacity, *rows.shape[1:]), dtype=rows.dtype)
            self._tensors[name][self._rows : self._rows + batch.rows] = rows
        self._rows += batch.rows
        self._held_contexts += batch.contexts

    def take(self) -> dict[str, Tensor]:
        """The shard's tensors, whose memory now belongs to the caller; the buffer starts anew."""
        taken = {name: tensor[: self._rows] for name, tensor in self._tensors.items()}
        self._tensors, self._held_contexts, self._rows = {}, 0, 0
        return taken
