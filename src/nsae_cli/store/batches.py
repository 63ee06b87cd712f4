"""Training rows in a shuffled order that is a pure function of (seed, epoch), read through a bounded window.

Each epoch permutes the shards and takes them in windows of at most `buffer_rows` rows; the rows of a window are
permuted together. Rows that are held out (and sinks, if they are dropped) are then taken out, so that a run with sinks
and one without see all other rows in the same order. Nothing has to be saved to resume: the order is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

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

    def copy(self) -> HookRows:
        """The same rows in memory of their own."""
        return HookRows(self.x.clone(), self.norm.clone(), self.group.clone(), self.zero.clone())

    @staticmethod
    def cat(parts: Sequence[HookRows]) -> HookRows:
        """Rows one after the other; a single part is returned as it is."""
        if len(parts) == 1:
            return parts[0]
        return HookRows(
            torch.cat([part.x for part in parts]),
            torch.cat([part.norm for part in parts]),
            torch.cat([part.group for part in parts]),
            torch.cat([part.zero for part in parts]),
        )


Batch = dict[str, HookRows]


@dataclass(frozen=True)
class Share:
    """A process's part of every batch: the rows from index·B/of on, where B is the batch size, a multiple of `of`."""

    index: int = 0
    of: int = 1


WHOLE = Share()


def read_rows(store: ActivationStore, profile: HookProfile, shard: int, keep: torch.Tensor) -> HookRows:
    """The rows of a shard that `keep` [rows] selects, with norms and groups."""
    norms = store.norms(shard, profile.hook)
    groups = profile.groups(norms, profile.flags(shard, norms).any)
    x = store.read_rows(shard, profile.hook, keep)
    return HookRows(x, norms[keep], groups[keep], profile.is_zero(norms)[keep])


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
        share: the part of every batch that is yielded; the other rows are not even kept in memory.
    """

    store: ActivationStore
    profiles: Sequence[HookProfile]
    contexts: Contexts
    batch_size: int
    seed: int
    buffer_rows: int
    drop_sinks: bool
    share: Share = WHOLE

    def __post_init__(self) -> None:
        assert len(self.profiles) == 1 or not self.drop_sinks, "hooks have different sinks, so they cannot share rows"

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing: the step tells where its batch begins."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows that one epoch holds."""
        first = self.profiles[0]
        return first.training_rows - (first.training_sinks if self.drop_sinks else 0)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches, beginning with the one of step `first_step` (0-based). Epochs follow without a gap.

        A batch may be a view of the window that is in memory: it is to be used before the next one is taken.
        """
        epoch, skip = divmod(first_step * self.batch_size, self.rows_per_epoch)
        begun = 0  # rows of whole batches since the first
        carried: dict[str, list[HookRows]] = {profile.hook: [] for profile in self.profiles}
        while True:
            for window in self._windows(epoch):
                order = self._order(epoch, window)
                if skip >= len(order):
                    skip -= len(order)
                    continue
                order = order[skip:]
                mine, skip, begun = self._own(order, begun), 0, begun + len(order)
                rows = self._load(window, mine)
                own_size = self.batch_size // self.share.of
                for _, batch in cut_batches(carried, partial(_select, rows), len(mine), own_size):
                    yield batch
            epoch += 1

    def _own(self, order: torch.Tensor, begun: int) -> torch.Tensor:
        """Those of rows in order that belong to this process; `begun`: how many came before, since a batch began."""
        if self.share.of == 1:
            return order
        place = (begun + torch.arange(len(order))) % self.batch_size
        return order[place // (self.batch_size // self.share.of) == self.share.index]

    def origin(self, step: int, index: int) -> str:
        """``row 37 of shard-00000.safetensors``: where the row `index` of the batch of `step` (0-based) comes from."""
        epoch, number = divmod(step * self.batch_size + index, self.rows_per_epoch)
        for window in self._windows(epoch):
            order = self._order(epoch, window)
            if number < len(order):
                break
            number -= len(order)
        row = int(order[number])
        for shard in window:
            entry = self.store.manifest.shards[shard]
            if row < entry.rows:
                break
            row -= entry.rows
        return f"row {row:,} of {entry.file}"

    def first_rows(self, count: int) -> Batch:
        """The rows that `batches` begins with: `count` of them, but at most one epoch."""
        parts: dict[str, list[HookRows]] = {profile.hook: [] for profile in self.profiles}
        for window in self._windows(0):
            order = self._order(0, window)[:count]
            count -= len(order)
            for hook, rows in self._load(window, order).items():
                parts[hook].append(rows)
            if count == 0:
                break
        return {hook: HookRows.cat(rows) for hook, rows in parts.items()}

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

    def _order(self, epoch: int, window: list[int]) -> torch.Tensor:
        """The window's training rows in shuffled order, as indices into the rows of its shards, int64."""
        keep = torch.cat([self._keep(shard) for shard in window])
        generator = torch.Generator().manual_seed(stable_seed("rows", self.seed, epoch, window[0]))
        # All rows are permuted, then the unwanted taken out: dropping sinks does not reshuffle the others.
        order = torch.randperm(len(keep), generator=generator)
        return order[keep[order]]

    def _load(self, window: list[int], order: torch.Tensor) -> Batch:
        """The rows of `order`, in that order. Beside the result, one shard is in memory at a time."""
        sizes = [self.store.manifest.shards[shard].rows for shard in window]
        place = torch.full((sum(sizes),), -1)
        place[order] = torch.arange(len(order))
        by_shard = place.split(sizes)
        return {profile.hook: self._gather(profile, window, by_shard, len(order)) for profile in self.profiles}

    def _gather(self, profile: HookProfile, window: list[int], places: Sequence[torch.Tensor], count: int) -> HookRows:
        """Puts each row of the window at its place; −1 stands for a row that is not wanted."""
        manifest = self.store.manifest
        rows = HookRows(
            x=torch.empty(count, manifest.d_in, dtype=manifest.torch_dtype),
            norm=torch.empty(count),
            group=torch.empty(count, dtype=torch.int64),
            zero=torch.empty(count, dtype=torch.bool),
        )
        for shard, place in zip(window, places, strict=True):
            keep = place >= 0
            if not bool(keep.any()):
                continue
            part, target = read_rows(self.store, profile, shard, keep), place[keep]
            for whole, values in ((rows.x, part.x), (rows.norm, part.norm), (rows.group, part.group)):
                whole[target] = values
            rows.zero[target] = part.zero
        return rows


def _select(rows: Batch, part: slice) -> Batch:
    return {hook: rows_of_hook.select(part) for hook, rows_of_hook in rows.items()}


Key = TypeVar("Key", bound=Hashable)


def cut_batches(
    carried: dict[Key, list[HookRows]],
    take: Callable[[slice], dict[Key, HookRows]],
    count: int,
    batch_size: int,
    start: int = 0,
) -> Iterator[tuple[int, dict[Key, HookRows]]]:
    """Cuts a window into batches; what is left over is carried into the next window's first batch.

    Args:
        carried: by key what earlier windows left over; changed.
        take: some rows of the window, in its shuffled order, by key.
        count: rows of the window.
        batch_size: rows per batch.
        start: rows of the window that were used before.

    Yields:
        How many rows of the window are used up, and a batch.
    """
    waiting = sum(len(part.norm) for part in next(iter(carried.values())))
    while waiting + count - start >= batch_size:
        part = slice(start, start + batch_size - waiting)
        start, waiting = part.stop, 0
        taken = take(part)
        yield start, {key: HookRows.cat([*carried[key], rows]) for key, rows in taken.items()}
        for parts in carried.values():
            parts.clear()
    if start < count:
        for key, rows in take(slice(start, count)).items():
            # A copy, so that the window's memory is free before the next window is read.
            carried[key].append(rows.copy())


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
        yield from split_rows(rows.select(live), numbers[live], batch_size)


def split_rows(rows: HookRows, numbers: torch.Tensor, batch_size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
    """Rows with their context numbers [B], at most `batch_size` at a time."""
    for start in range(0, len(numbers), batch_size):
        part = slice(start, start + batch_size)
        yield rows.select(part), numbers[part]
