"""What one worker does of a collection that several share: which contexts it reads, what it says, on which GPU.

A unit of work is a shard: a fixed number of contexts in whole batches. Worker r of N makes the shards r, r + N, …; so
neither a shard's rows nor the borders of its batches depend on how many workers there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from nsae_cli import catalogue
from nsae_cli.device import DeviceOption, choose_device
from nsae_cli.launch import Placement
from nsae_cli.lm.packing import Context
from nsae_cli.reporter import Reporter, SilentReporter, Task
from nsae_cli.store.lock import Turn
from nsae_cli.store.lock_file import State
from nsae_cli.store.shards import shards_text


@dataclass
class Share:
    """The contexts of the shards that are to be made here, out of all contexts of the corpus, which it counts.

    Attributes:
        contexts: of the whole corpus, in its order.
        shard_contexts: contexts per shard.
        makes: whether a shard, by its number, is to be made here.
        seen: how many contexts the corpus has, once all were asked for.
    """

    contexts: Iterable[Context]
    shard_contexts: int
    makes: Callable[[int], bool]
    seen: int = field(init=False, default=0)

    def __iter__(self) -> Generator[Context, None, None]:
        for context in self.contexts:
            shard = self.seen // self.shard_contexts
            self.seen += 1
            if self.makes(shard):
                yield context

    @property
    def shards(self) -> int:
        """How many shards the contexts seen so far fill or begin."""
        return -(-self.seen // self.shard_contexts)


@dataclass(frozen=True)
class WorkerReporter:
    """What N workers print on one console: remarks and progress of worker 0, warnings of all with their number."""

    inner: Reporter
    worker: Placement

    def note(self, text: str) -> None:
        """Only worker 0's."""
        if self.worker.rank == 0:
            self.inner.note(text)

    def warn(self, text: str) -> None:
        """With the number."""
        self.inner.warn(f"worker {self.worker}: {text}")

    def task(self, description: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[Task]:
        """Only worker 0's, which stands for all: their shares are equal."""
        shown = self.inner if self.worker.rank == 0 else SilentReporter()
        return shown.task(f"{description} (worker {self.worker})", total, unit)


def last_word(reporter: Reporter, text: str) -> None:
    """One line of every worker, about how its work ended."""
    if isinstance(reporter, WorkerReporter):
        reporter.inner.note(f"worker {reporter.worker}: {text}")


def idle_text(shards: int | None, worker: Placement) -> str | None:
    """What worker 0 says where there are not enough shards for all workers; None where there are."""
    if shards is None or shards >= worker.world or worker.rank:
        return None
    return f"{shards_text(shards)} for {worker.world} workers: {worker.world - shards} will have nothing to do"


def device_of(option: DeviceOption, worker: Placement) -> tuple[torch.device, str]:
    """As `choose_device`; ``auto`` gives each of several workers on a machine with CUDA a GPU of its own.

    Where the launcher shows each process only its own GPU, that is number 0; where there are more workers than GPUs,
    they take turns.

    Raises:
        ResourceError: the device asked for is not there.
    """
    if worker.alone or option != "auto" or not torch.cuda.is_available():
        return choose_device(option)
    index = worker.local_rank % torch.cuda.device_count()
    device, reason = choose_device(f"cuda:{index}")
    return device, reason.replace(f"--device cuda:{index}", f"--device auto: process {worker.local_rank} here")


def some_of(numbers: Sequence[int]) -> str:
    """``3, 5, 7 and 4 more``."""
    return ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3} more" if numbers[3:] else "")


def left_to_others(missing: list[int], shards: int, turn: Turn) -> str:
    """Says who is to make the shards that are missing.

    Args:
        missing: their numbers.
        shards: how many the store has.
        turn: this worker's.

    Raises:
        ArtifactError: some belong to a worker that was killed, and are made by nobody now.
    """
    name, world, states = turn.folder.name, turn.worker.world, turn.others()
    dead = {rank for rank, state in states.items() if state is State.LEFT} | {turn.worker.rank}
    lost = [index for index in missing if index % world in dead]
    if lost:
        workers = sorted({index % world for index in lost})
        raise catalogue.UNFINISHED(
            f"{name}: shard {some_of(lost)} missing, left by worker {some_of(workers)} that has died; "
            f"run the same command again, with any number of workers"
        )
    owners = sorted({index % world for index in missing})
    at_work, idle = [r for r in owners if r in states], [r for r in owners if r not in states]
    who = [f"{what}: {some_of(ranks)}" for what, ranks in (("at work", at_work), ("not at work", idle)) if ranks]
    return f"{len(missing)} of {shards_text(shards)} left to other workers ({'; '.join(who)})"


def rows_of_share(rows: int, shard_rows: int, makes: Callable[[int], bool]) -> int:
    """How many of a store's rows are in the shards that are to be made here."""
    return sum(min(shard_rows, rows - first) for i, first in enumerate(range(0, rows, shard_rows)) if makes(i))
