"""Writing an activation store shard by shard, by one process or by several that share its shards."""

from __future__ import annotations

import contextlib
import itertools
import queue
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nsae_cli import catalogue
from nsae_cli.launch import ALONE, Placement
from nsae_cli.store import commit
from nsae_cli.store.manifest import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry
from nsae_cli.store.progress import (
    durable_shards,
    progress_files,
    progress_line,
    progress_name,
    progress_text,
    recover_progress,
)
from nsae_cli.store.shards import shard_name

_HALF_SHARD = re.compile(r"\.shard-(\d{5,})\.safetensors\.[0-9a-f]{8}\.tmp")


@dataclass
class StoreWriter:
    """Appends shards to a store's folder; a background thread hashes and writes while the model runs on.

    A shard is durable once its line is in this worker's progress file (`store.progress`). `finish` writes the manifest,
    the completion mark. At most one shard waits while another is being written, so that host memory does not grow with
    the number of tokens.

    Several workers may write one store at the same time, each its own shards; opening and `finish` are for one of
    them at a time (`store.lock`).

    Args:
        folder: the store's folder; created.
        config: the resolved, result-changing options of the run.
        worker: whose shards are written here.

    Raises:
        UsageError: the folder holds an unfinished store with another configuration.
        ResourceError: the folder cannot be written.
    """

    folder: Path
    config: dict[str, Any]
    worker: Placement = ALONE
    #: Shards that were complete when this began, by number, whoever has made them; there may be gaps.
    durable: dict[int, ShardEntry] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        commit.make_folder(self.folder)
        self._remove_leftovers()
        self._progress = self.folder / progress_name(self.worker.rank)
        if self._progress.exists():
            recover_progress(self._progress, self.config)
        self.durable = durable_shards(self.folder, self.config)
        if not self._progress.exists():
            commit.write_text(self._progress, progress_text(self.config, []))
        self._written: dict[int, ShardEntry] = {}
        self._queue: queue.Queue[tuple[int, dict[str, torch.Tensor], int] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="nsae-store-writer", daemon=True)
        self._thread.start()

    def _remove_leftovers(self) -> None:
        """Removes what a killed run left half-written, unless it may be another worker's who writes just now."""
        if self.worker.alone:
            commit.remove_leftovers(self.folder)
            return
        for path in commit.leftovers(self.folder):
            half = _HALF_SHARD.fullmatch(path.name)
            if half is not None and self.worker.owns(int(half[1])):
                path.unlink(missing_ok=True)

    @property
    def durable_shards(self) -> int:
        """How many shards were on disk when this began, or were written here since."""
        return len({*self.durable, *self._written})

    @property
    def written_shards(self) -> int:
        """How many shards were written here."""
        return len(self._written)

    @property
    def written_rows(self) -> int:
        """How many rows were written here."""
        return sum(entry.rows for entry in self._written.values())

    @property
    def durable_rows(self) -> int:
        """How many rows were complete when this began."""
        return sum(entry.rows for entry in self.durable.values())

    def makes(self, index: int) -> bool:
        """Whether a shard is to be written here: it is this worker's, and was not there when this began."""
        return self.worker.owns(index) and index not in self.durable

    def to_make(self) -> Iterator[int]:
        """Numbers of the shards that are to be written here, without end: how many there are is not known."""
        return filter(self.makes, itertools.count())

    def write(self, index: int, tensors: dict[str, torch.Tensor], nonfinite_rows: int) -> None:
        """Queues a shard. `tensors` must not be changed afterwards. Raises what the background thread met."""
        self._raise_failure()
        self._queue.put((index, tensors, nonfinite_rows))

    def wait(self) -> None:
        """Waits until everything queued is durable."""
        if self._thread.is_alive():
            self._queue.put(None)
        self._thread.join()
        self._raise_failure()

    def missing(self, shards: int) -> list[int]:
        """Which of a store's shards are not durable now, whoever is to make them."""
        entries = self._entries()
        return [index for index in range(shards) if index not in entries]

    def finish(self, description: dict[str, Any]) -> Manifest:
        """Writes the manifest from `description` (its keys without rows and shards) and ends the store."""
        self.wait()
        entries = [entry for _, entry in sorted(self._entries().items())]
        if (gap := next((i for i, entry in enumerate(entries) if entry.file != shard_name(i)), None)) is not None:
            raise catalogue.SHARD_MISSING(
                f"{self.folder}: {shard_name(gap)} is missing; delete the folder and run again"
            )
        manifest = Manifest.model_validate(
            {
                "format_version": FORMAT_VERSION,
                **description,
                "rows": sum(entry.rows for entry in entries),
                "shards": [entry.model_dump() for entry in entries],
            }
        )
        if not self.worker.alone:
            # Every shard is durable, so nobody is writing: what is half-written is of workers that were killed.
            commit.remove_leftovers(self.folder)
        sealed = commit.write_document(self.folder / MANIFEST, manifest.model_dump(exclude={"checksum"}))
        for path in reversed(progress_files(self.folder)):
            commit.remove_file(path)
        return Manifest.model_validate(sealed)

    def abandon(self) -> None:
        """Stops the background thread after the shard in hand; what is durable stays for the next run."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=60)
        self._thread.join(timeout=60)

    def _entries(self) -> dict[int, ShardEntry]:
        return durable_shards(self.folder) | self.durable | self._written

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # drain, so that the producer never blocks on a dead writer
            try:
                self._commit_shard(*item)
            except BaseException as failure:
                self._failure = failure

    def _commit_shard(self, index: int, tensors: dict[str, torch.Tensor], nonfinite_rows: int) -> None:
        path = self.folder / shard_name(index)
        commit.write_tensors(path, tensors)
        entry = ShardEntry(
            file=path.name,
            rows=next(iter(tensors.values())).shape[0],
            bytes=path.stat().st_size,
            tensors={name: commit.tensor_sha256(tensor) for name, tensor in sorted(tensors.items())},
            nonfinite_rows=nonfinite_rows,
        )
        commit.append_line(self._progress, progress_line(entry))
        self._written[index] = entry


def unneeded_files(folder: Path) -> list[Path]:
    """What a run that was killed right after it had completed the store left in its folder."""
    return [*commit.leftovers(folder), *progress_files(folder)]
