"""One writer per folder: a lock file beside it, ``.NAME.lock``, held while a command writes into NAME.

The lock is the kernel's (flock), so that it ends with the process, however that ends. The file says who holds it, for
people, and for another machine on a shared disk, whose locks may not reach this one. It is removed when the command
ends; one that was left behind by a process of this machine is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.errors import BusyError
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit

#: How long to wait for the holder to write its name, once it has the lock.
_NAME_SECONDS = 0.5
#: What flock says on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who writes: machine, process and when it began (local time)."""

    host: str
    pid: int
    started: str

    @classmethod
    def this_process(cls) -> Holder:
        """This process, now."""
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """What a lock file says; None where it says nothing, or nothing that makes sense."""
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
            return cls(str(found["host"]), int(found["pid"]), str(found["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


def lock_path(folder: Path) -> Path:
    """The lock file of an artifact's folder."""
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def writing(folder: Path, reporter: Reporter, *, break_lock: bool = False) -> Iterator[None]:
    """Holds the lock of `folder` (which need not exist) while the context is open.

    Args:
        folder: the artifact's folder.
        reporter: is told when a lock was left behind by a process that has ended.
        break_lock: take over a lock of another machine, on whose word that it still writes nobody can rely.

    Raises:
        BusyError: another process is writing there, or may be.
        ResourceError: the folder above cannot be written.
    """
    path = lock_path(folder)
    new = [parent for parent in folder.parents if not parent.exists()]
    commit.make_folder(folder.parent)
    descriptor = _acquire(path, folder.name, reporter, break_lock)
    try:
        yield
    finally:
        # Removed while it is held: whoever opened it before sees that the name is gone, and opens the next one.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        # A command that was refused before it wrote anything leaves no empty folders.
        for parent in new:
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Removes the lock file of a process of this machine that was killed once its artifact was complete.

    Nobody takes the lock of a complete artifact any more, so that the file would stay. One that is held, or that
    another machine has left, is let alone.
    """
    path = lock_path(folder)
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = Holder.read(descriptor)
            if _still_named(descriptor, path) and (holder is None or holder.host == socket.gethostname()):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _acquire(path: Path, name: str, reporter: Reporter, break_lock: bool) -> int:
    while True:
        with commit.disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            alone = _lock(descriptor, name)
            if not _still_named(descriptor, path):
                os.close(descriptor)
                continue
            _take_over(Holder.read(descriptor), name, reporter, break_lock, certain=alone)
            with commit.disk_errors(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Holder.this_process())).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, name: str) -> bool:
    """Takes the kernel's lock; False where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(name, _named_holder(descriptor), "wait until it has ended, or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _named_holder(descriptor: int) -> Holder | None:
    deadline = time.monotonic() + _NAME_SECONDS
    while (holder := Holder.read(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return holder


def _still_named(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one that the name stands for: its last holder may have removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _take_over(earlier: Holder | None, name: str, reporter: Reporter, break_lock: bool, *, certain: bool) -> None:
    """Decides about the name in a lock file whose lock is free.

    Args:
        certain: the kernel says that nobody on this machine holds it.
    """
    if earlier is None:
        return
    if earlier.host != socket.gethostname():
        if not break_lock:
            raise _busy(name, earlier, "if it has ended there, give `nsae --break-lock` before the command")
        reporter.warn(f"the lock of {name} was broken: {earlier}")
        return
    if not certain and _is_alive(earlier.pid) and not break_lock:
        raise _busy(name, earlier, "wait until it has ended, or give `nsae --break-lock` before the command")
    reporter.warn(f"{name}: {earlier} ended without finishing; going on from what it left")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _busy(name: str, holder: Holder | None, remedy: str) -> BusyError:
    who = "another process" if holder is None else str(holder)
    return catalogue.FOLDER_BUSY(f"{name} is being written by {who}; {remedy}")
