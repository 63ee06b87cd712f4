"""Gathers harvested batches into shards and hands these to the store's writer."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from nsae_cli.lm.harvest import HarvestedBatch
from nsae_cli.lm.plan import duration_text
from nsae_cli.lm.shares import rows_of_share
from nsae_cli.reporter import Reporter
from nsae_cli.store.writer import StoreWriter


class ShardBuffer:
    """Room for the rows of a fixed number of contexts, allocated once per shard.

    Args:
        contexts: per full shard; the batches added end exactly there.
        context: most rows of a context.

    Attributes:
        capacity: most rows of a shard.
    """

    def __init__(self, contexts: int, context: int) -> None:
        self._contexts = contexts
        self.capacity = contexts * context
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
                self._tensors[name] = torch.empty((self.capacity, *rows.shape[1:]), dtype=rows.dtype)
            self._tensors[name][self._rows : self._rows + batch.rows] = rows
        self._rows += batch.rows
        self._held_contexts += batch.contexts

    def take(self) -> dict[str, Tensor]:
        """The shard's tensors, whose memory now belongs to the caller; the buffer starts anew."""
        taken = {name: tensor[: self._rows] for name, tensor in self._tensors.items()}
        self._tensors, self._held_contexts, self._rows = {}, 0, 0
        return taken


def write_shards(
    harvested: Iterable[HarvestedBatch], writer: StoreWriter, shard: ShardBuffer, rows: int | None, reporter: Reporter
) -> None:
    """Fills the shards that are to be written here, one after the other, and hands each to the writer's thread.

    Args:
        harvested: the rows of exactly these shards.
        writer: the store's.
        shard: an empty one, in which they are filled.
        rows: of the whole store, as far as known.
        reporter: shows how far it is.
    """
    numbers = writer.to_make()
    left = None if rows is None else rows_of_share(rows, shard.capacity, writer.makes)
    clock = _Clock(left)
    with reporter.task("collect", rows if writer.worker.alone else left, "rows") as task:
        task.advance(writer.durable_rows if writer.worker.alone else 0)
        for batch in harvested:
            shard.add(batch)
            if shard.full:
                # Rows that are not finite have stopped the run before.
                writer.write(next(numbers), shard.take(), nonfinite_rows=0)
            task.advance(batch.rows)
            if (expected := clock.after(batch.rows)) is not None:
                reporter.note(f"expected time {duration_text(expected)}")
        if not shard.empty:
            writer.write(next(numbers), shard.take(), nonfinite_rows=0)


class _Clock:
    """Expects the whole run's time from one batch: the second, since the first pays for warming up."""

    def __init__(self, rows: int | None) -> None:
        self._rows = rows
        self._batches = 0
        self._last = 0.0

    def after(self, batch_rows: int) -> float | None:
        """To be called after each batch; the expected seconds for all rows, once, after the second batch."""
        self._batches += 1
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if self._batches != 2 or self._rows is None:
            return None
        return elapsed / batch_rows * self._rows
