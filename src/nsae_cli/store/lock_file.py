"""Lock files: where they are, who holds one, and what one that nobody holds stands for.

The lock is the kernel's (flock), so that it ends with the process, however that ends. The file says who holds it, for
people, and for another machine on a shared disk, whose locks may not reach this one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path

from nsae_cli.launch import ALONE, Placement

#: What flock says on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who writes: machine, process and when it began (local time); of a worker also the software that it runs."""

    host: str
    pid: int
    started: str
    software: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def this_process(cls, software: Mapping[str, str]) -> Holder:
        """This process, now."""
        return cls(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), dict(software))

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """What a lock file says; None where it says nothing, or nothing that makes sense."""
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
            software = {str(key): str(value) for key, value in found.get("software", {}).items()}
            return cls(str(found["host"]), int(found["pid"]), str(found["started"]), software)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, descriptor: int) -> None:
        """Says so in a lock file."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(self)).encode(), 0)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is a process of another machine."""
        return self.host != socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class State(Enum):
    """What another's lock file stands for."""

    HELD = "a process that is at work"
    FOREIGN = "a process of another machine, of which nothing is known"
    LEFT = "a process of this machine that was killed"


def lock_path(folder: Path, worker: Placement = ALONE) -> Path:
    """The lock file of an artifact's folder, or of one of the workers that share it."""
    name = f".{folder.name}.lock"
    return folder.parent / (name if worker.alone else f"{name}-{worker.rank}-of-{worker.world}")


def turn_path(folder: Path) -> Path:
    """The lock file of the worker whose turn it is."""
    return folder.parent / f".{folder.name}.lock-all"


def locks_of_workers(folder: Path) -> dict[Path, Placement]:
    """The lock files of workers that are there."""
    pattern = re.compile(re.escape(f".{folder.name}.lock-") + r"(\d+)-of-(\d+)")
    with contextlib.suppress(OSError):
        names = {name: pattern.fullmatch(name) for name in sorted(os.listdir(folder.parent))}
        return {folder.parent / n: Placement(int(found[1]), int(found[2])) for n, found in names.items() if found}
    return {}


def take(descriptor: int) -> bool:
    """Takes the kernel's lock; False where the file system has none.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def still_named(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one that the name stands for: its last holder may have removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def release(path: Path, descriptor: int) -> None:
    """Ends a lock and removes its file."""
    # Removed while it is held: whoever opened it before sees that the name is gone, and opens the next one.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(descriptor)


def look(path: Path, *, remove: bool = False) -> tuple[State | None, Holder | None]:
    """What another's lock file stands for (None: it is not there), and what it says.

    Args:
        path: the file.
        remove: remove it if its process was killed.
    """
    if not os.path.lexists(path):
        return None, None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None, None
    try:
        holder = Holder.read(descriptor)
        try:
            certain = take(descriptor)
        except OSError:
            return State.HELD, holder
        if not still_named(descriptor, path):
            return None, None
        if holder is not None and holder.is_elsewhere:
            return State.FOREIGN, holder
        if not certain and (holder is None or is_alive(holder.pid)):
            return State.HELD, holder
        if remove:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return State.LEFT, holder
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
