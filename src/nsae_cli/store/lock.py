"""One writer per folder: a lock file beside it, ``.NAME.lock``, held while a command writes into NAME.

It is removed when the command ends; one that was left behind by a process of this machine is taken over.

Workers that share one folder hold a lock each, ``.NAME.lock-1-of-3``: many may write there, but no two of one number,
none of another job (another number of workers), and nobody who works alone. What only one of them may do at a time is
done in its turn, under ``.NAME.lock-all``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import BusyError
from nsae_cli.launch import ALONE, Placement
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit, lock_file
from nsae_cli.store.lock_file import Holder, State, lock_path, locks_of_workers, look, turn_path

#: How long to wait for the holder to write its name, once it has the lock.
_NAME_SECONDS = 0.5
#: How often a worker looks whether it is its turn.
_TURN_SECONDS = 0.02

_WAIT = "wait until it has ended, or stop it"
_BREAK = "if it has ended there, give `nsae --break-lock` before the command"


@dataclass(frozen=True)
class Turn:
    """The lock that this process holds, among those of the other workers.

    Attributes:
        folder: the artifact's.
        worker: this process.
    """

    folder: Path
    worker: Placement

    def taken(self) -> contextlib.AbstractContextManager[None]:
        """Makes all other workers that ask for their turn wait while the context is open.

        Raises:
            Interrupted: a signal asked to stop while this one waited.
        """
        return contextlib.nullcontext() if self.worker.alone else _turn(turn_path(self.folder))

    def others(self) -> dict[int, State]:
        """The other workers of this job that have a lock, by number. To be asked in one's turn."""
        found = {}
        for path, other in locks_of_workers(self.folder).items():
            if other.world == self.worker.world and other.rank != self.worker.rank:
                state, _ = look(path)
                if state is not None:
                    found[other.rank] = state
        return found


@contextlib.contextmanager
def writing(
    folder: Path,
    reporter: Reporter,
    *,
    break_lock: bool = False,
    worker: Placement = ALONE,
    software: Mapping[str, str] | None = None,
) -> Iterator[Turn]:
    """Holds the lock of `folder` (which need not exist) while the context is open.

    Args:
        folder: the artifact's folder.
        reporter: is told when a lock was left behind by a process that has ended.
        break_lock: take over a lock of another machine, on whose word that it still writes nobody can rely.
        worker: which of the processes that share the folder this one is.
        software: what all of these must have alike, such as the version of torch.

    Raises:
        BusyError: another process is writing there, or may be.
        UsageError: a worker of the same job has other software.
        ResourceError: the folder above cannot be written.
    """
    path = lock_path(folder, worker)
    new = [parent for parent in folder.parents if not parent.exists()]
    commit.make_folder(folder.parent)
    turn = Turn(folder, worker)
    with turn.taken():
        descriptor = _acquire(path, folder.name, reporter, break_lock, software or {})
        try:
            # After its own lock is taken: of two that come at once, at least one sees the other.
            _look_at_others(turn, reporter, break_lock, software or {})
        except BaseException:
            lock_file.release(path, descriptor)
            raise
    try:
        yield turn
    finally:
        lock_file.release(path, descriptor)
        # A command that was refused before it wrote anything leaves no empty folders, but for one that other workers
        # may be about to write into.
        for parent in new if worker.alone else ():
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Removes the lock files of processes of this machine that were killed once their artifact was complete.

    Nobody takes the lock of a complete artifact any more, so that the file would stay. One that is held, or that
    another machine has left, is let alone.
    """
    for path in (lock_path(folder), *locks_of_workers(folder), turn_path(folder)):
        look(path, remove=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    while True:
        descriptor = _open(path)
        try:
            with contextlib.suppress(BlockingIOError):
                lock_file.take(descriptor)
                if lock_file.still_named(descriptor, path):
                    break
            interrupt.stop_if_requested("stopped while other workers had their turn; the same command goes on")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(_TURN_SECONDS)
    try:
        yield
    finally:
        lock_file.release(path, descriptor)


def _open(path: Path) -> int:
    with commit.disk_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _acquire(path: Path, name: str, reporter: Reporter, break_lock: bool, software: Mapping[str, str]) -> int:
    while True:
        descriptor = _open(path)
        try:
            alone = _lock(descriptor, name)
            if not lock_file.still_named(descriptor, path):
                os.close(descriptor)
                continue
            _take_over(Holder.read(descriptor), name, reporter, break_lock, certain=alone)
            with commit.disk_errors(path):
                Holder.this_process(software).write(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, name: str) -> bool:
    """Takes the kernel's lock; False where the file system has none."""
    try:
        return lock_file.take(descriptor)
    except BlockingIOError:
        raise _busy(name, _named_holder(descriptor), _WAIT) from None


def _named_holder(descriptor: int) -> Holder | None:
    deadline = time.monotonic() + _NAME_SECONDS
    while (holder := Holder.read(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return holder


def _take_over(earlier: Holder | None, name: str, reporter: Reporter, break_lock: bool, *, certain: bool) -> None:
    """Decides about the name in a lock file whose lock is free.

    Args:
        certain: the kernel says that nobody on this machine holds it.
    """
    if earlier is None:
        return
    if earlier.is_elsewhere:
        if not break_lock:
            raise _busy(name, earlier, _BREAK)
        reporter.warn(f"the lock of {name} was broken: {earlier}")
        return
    if not certain and lock_file.is_alive(earlier.pid) and not break_lock:
        raise _busy(name, earlier, "wait until it has ended, or give `nsae --break-lock` before the command")
    _say_left(earlier, name, reporter)


def _look_at_others(turn: Turn, reporter: Reporter, break_lock: bool, software: Mapping[str, str]) -> None:
    """Looks at the locks beside one's own; those that a killed process has left are removed.

    Raises:
        BusyError: one is of another job.
        UsageError: one is of this job, with other software.
    """
    name, worker = turn.folder.name, turn.worker
    if worker.alone:  # a worker holds this one itself just now
        look(turn_path(turn.folder), remove=True)
    others = locks_of_workers(turn.folder) | ({} if worker.alone else {lock_path(turn.folder): ALONE})
    for path, other in others.items():
        if path == lock_path(turn.folder, worker):
            continue
        state, holder = look(path, remove=True)
        if state is State.LEFT and holder is not None:
            _say_left(holder, name, reporter)
        elif state is State.FOREIGN and break_lock and other.world != worker.world:
            reporter.warn(f"the lock of {name} was broken: {holder}")
            with commit.disk_errors(path):
                path.unlink(missing_ok=True)
        elif state in (State.HELD, State.FOREIGN) and other.world != worker.world:
            raise _busy(name, holder, _WAIT if state is State.HELD else _BREAK)
        elif state is not None and holder is not None and holder.software != software and not break_lock:
            raise catalogue.OPTIONS_CHANGED(
                f"worker {other} has other software ({_differences(holder.software, software)}); start all workers "
                f"with the same"
            )


def _say_left(holder: Holder, name: str, reporter: Reporter) -> None:
    reporter.warn(f"{name}: {holder} ended without finishing; going on from what it left")


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} {theirs.get(key, 'unknown')}, here {ours.get(key, 'unknown')}" for key in keys)


def _busy(name: str, holder: Holder | None, remedy: str) -> BusyError:
    who = "another process" if holder is None else str(holder)
    return catalogue.FOLDER_BUSY(f"{name} is being written by {who}; {remedy}")
