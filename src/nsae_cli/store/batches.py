"""Training rows in a shuffled order that is a pure function of (seed, epoch), read through a bounded window.

Each epoch permutes the shards and takes them in windows of at most `buffer_rows` rows; the rows of a window are
permuted together. Rows that are held out (and sinks, if they are dropped) are then taken out, so that a run with sinks
and one without see all other rows in the same order. Nothing has to be saved to resume: the order is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import HookProfile
from nsae_cli.store.shards import ActivationStore


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class HookRows:
    """Rows of one hook.

    Attributes:
        x: raw activations [B, d_in] in the storage dtype.
        norm: their stored norms [B], float32.
        group: norm bin 0…9, or 10 for sinks [B], int64.
        zero: rows that count for nothing [B], bool.
    """

    x: torch.Tensor
    norm: torch.Tensor
    group: torch.Tensor
    zero: torch.Tensor

    def select(self, index: torch.Tensor | slice) -> HookRows:
        """Some of the rows."""
        return HookRows(self.x[index], self.norm[index], self.group[index], self.zero[index])

    def to(self, device: torch.device) -> HookRows:
        """The rows on a device."""
        return HookRows(self.x.to(device), self.norm.to(device), self.group.to(device), self.zero.to(device))

    @staticmethod
    def cat(parts: Sequence[HookRows]) -> HookRows:
        """Rows one after the other."""
        return HookRows(
            torch.cat([part.x for part in parts]),
            torch.cat([part.norm for part in parts]),
            torch.cat([part.group for part in parts]),
            torch.cat([part.zero for part in parts]),
        )


Batch = dict[str, HookRows]


def read_rows(store: ActivationStore, profile: HookProfile, shard: int, keep: torch.Tensor) -> HookRows:
    """The rows of a shard that `keep` [rows] selects, with norms and groups."""
    norms = store.norms(shard, profile.hook)
    groups = profile.groups(norms, profile.flags(shard, norms).any)
    x = store.read(shard, [profile.hook])[profile.hook]
    return HookRows(x[keep], norms[keep], groups[keep], profile.is_zero(norms)[keep])


@dataclass
class BatchStream:
    """Batches of training rows of one or several hooks.

    Attributes:
        store: where the rows are.
        profiles: one per hook; all hooks see the same rows.
        contexts: of the store.
        batch_size: rows per batch.
        seed: of the order.
        buffer_rows: rows of a window at most (at least one shard).
        drop_sinks: leave out the rows that are sinks at the (one) hook.
    """

    store: ActivationStore
    profiles: Sequence[HookProfile]
    contexts: Contexts
    batch_size: int
    seed: int
    buffer_rows: int
    drop_sinks: bool

    def __post_init__(self) -> None:
        assert len(self.profiles) == 1 or not self.drop_sinks, "hooks have different sinks, so they cannot share rows"

    @property
    def rows_per_epoch(self) -> int:
        """Rows that one epoch holds."""
        first = self.profiles[0]
        return first.training_rows - (first.training_sinks if self.drop_sinks else 0)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches, beginning with the one of step `first_step` (0-based). Epochs follow without a gap."""
        epoch, skip = divmod(first_step * self.batch_size, self.rows_per_epoch)
        carried: dict[str, list[HookRows]] = {profile.hook: [] for profile in self.profiles}
        while True:
            for window in self._windows(epoch):
                keep = {shard: self._keep(shard) for shard in window}
                rows = sum(int(mask.sum()) for mask in keep.values())
                if skip >= rows:
                    skip -= rows
                    continue
                order = self._order(epoch, window, keep)[skip:]
                skip = 0
                yield from self._cut(carried, self._load(window, keep), order)
            epoch += 1

    def _windows(self, epoch: int) -> Iterator[list[int]]:
        sizes = [entry.rows for entry in self.store.manifest.shards]
        generator = torch.Generator().manual_seed(stable_seed("shards", self.seed, epoch))
        window: list[int] = []
        rows = 0
        for shard in torch.randperm(len(sizes), generator=generator).tolist():
            if window and rows + sizes[shard] > self.buffer_rows:
                yield window
                window, rows = [], 0
            window.append(shard)
            rows += sizes[shard]
        yield window

    def _keep(self, shard: int) -> torch.Tensor:
        keep = ~self.contexts.held_out(shard)
        if self.drop_sinks:
            profile = self.profiles[0]
            keep &= ~profile.flags(shard, self.store.norms(shard, profile.hook)).any
        return keep

    def _order(self, epoch: int, window: list[int], keep: dict[int, torch.Tensor]) -> torch.Tensor:
        """Indices into the window's kept rows, in shuffled order."""
        mask = torch.cat([keep[shard] for shard in window])
        generator = torch.Generator().manual_seed(stable_seed("rows", self.seed, epoch, window[0]))
        # All rows are permuted, then the unwanted taken out: dropping sinks does not reshuffle the others.
        order = torch.randperm(len(mask), generator=generator)
        index_among_kept = mask.long().cumsum(0) - 1
        return index_among_kept[order[mask[order]]]

    def _load(self, window: list[int], keep: dict[int, torch.Tensor]) -> Batch:
        return {
            profile.hook: HookRows.cat([read_rows(self.store, profile, shard, keep[shard]) for shard in window])
            for profile in self.profiles
        }

    def _cut(self, carried: dict[str, list[HookRows]], rows: Batch, order: torch.Tensor) -> Iterator[Batch]:
        """Cuts a window into batches; what is left over is carried into the next window's first batch."""
        start = 0
        waiting = sum(len(part.norm) for part in next(iter(carried.values())))
        while waiting + len(order) - start >= self.batch_size:
            index = order[start : start + self.batch_size - waiting]
            start += len(index)
            yield {hook: HookRows.cat([*carried[hook], rows[hook].select(index)]) for hook in rows}
            for parts in carried.values():
                parts.clear()
            waiting = 0
        rest = order[start:]
        if len(rest):
            for hook, parts in carried.items():
                parts.append(rows[hook].select(rest))


def held_out_rows(
    store: ActivationStore, profile: HookProfile, contexts: Contexts, batch_size: int
) -> Iterator[tuple[HookRows, torch.Tensor]]:
    """Held-out rows of one hook in store order, with their context numbers [B]; rows that are zero are left out."""
    for shard in range(len(store.manifest.shards)):
        keep = contexts.held_out(shard)
        if not bool(keep.any()):
            continue
        rows = read_rows(store, profile, shard, keep)
        numbers = contexts.ids(shard)[keep]
        live = ~rows.zero
        rows, numbers = rows.select(live), numbers[live]
        for start in range(0, len(numbers), batch_size):
            part = slice(start, start + batch_size)
            yield rows.select(part), numbers[part]
