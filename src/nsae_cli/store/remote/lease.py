"""One writer per artifact at a URL. Object stores have no locks, so this is an object that its holder renews.

``KIND/.NAME.lock`` says who writes and when that was last renewed. It is made only where none is (a conditional PUT,
where the place has those), removed at the end, and taken over once nobody has renewed it for `ABANDONED` seconds, as
where its holder was killed. A holder that finds its lease taken stops before it uploads anything more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.errors import BusyError, NsaeError
from nsae_cli.reporter import Reporter
from nsae_cli.store.lock_file import Holder, is_alive
from nsae_cli.store.remote.objects import Objects

#: Seconds between renewals, and after which a lease that was not renewed is taken over.
RENEWED_EVERY, ABANDONED = 30.0, 180.0


@dataclass(frozen=True)
class _Lease:
    holder: Holder
    token: str
    renewed: float
    machine: str | None

    @classmethod
    def parse(cls, content: bytes) -> _Lease | None:
        try:
            found: dict[str, Any] = json.loads(content)
            holder = Holder(str(found["host"]), int(found["pid"]), str(found["started"]))
            return cls(holder, str(found["token"]), float(found["renewed"]), found.get("machine"))
        except (ValueError, KeyError, TypeError):
            return None

    def content(self) -> bytes:
        holder = self.holder
        facts = {"host": holder.host, "pid": holder.pid, "started": holder.started}
        return json.dumps(facts | {"token": self.token, "renewed": time.time(), "machine": self.machine}).encode()

    def age(self) -> float:
        """Seconds since it was renewed, by this machine's clock."""
        return max(0.0, time.time() - self.renewed)


class Writing:
    """A lease that is held.

    Args:
        objects: where.
        path: of the lock, from the URL.
        name: of the artifact, for messages.
        lease: what was written there.
    """

    def __init__(self, objects: Objects, path: str, name: str, lease: _Lease) -> None:
        self._objects, self._path, self._name, self._lease = objects, path, name, lease
        self._taken_by: Holder | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="nsae-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """To be called before something is uploaded.

        Raises:
            BusyError: another process has taken over.
        """
        if self._taken_by is not None:
            raise catalogue.FOLDER_BUSY(
                f"{self._name} was taken over by {self._taken_by}, as this process did not renew its lock in time; "
                f"run the same command again when that one has ended"
            )

    def look(self) -> bool:
        """Whether the lease is still this process's; remembers whose it is otherwise."""
        try:
            found = _Lease.parse(self._objects.read(self._path))
        except FileNotFoundError:
            found = None  # removed by somebody who broke it and has ended, or by a person
        if found is not None and found.token != self._lease.token:
            self._taken_by = found.holder
        return found is not None and self._taken_by is None

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_EVERY):
            with contextlib.suppress(NsaeError):  # a network that is away for a while; the next upload will tell
                if self.look():
                    self._objects.write(self._path, self._lease.content())

    def end(self) -> None:
        """Gives the lease back."""
        self._ended.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(NsaeError):  # it is abandoned then, and taken over in a few minutes
            if self.look():
                self._objects.remove(self._path)


def lock_path(folder: str) -> str:
    """The lock of an artifact's folder; both are paths from the URL."""
    parent, _, name = folder.rpartition("/")
    return f"{parent}/.{name}.lock" if parent else f".{name}.lock"


@contextlib.contextmanager
def writing(objects: Objects, folder: str, reporter: Reporter, *, break_lock: bool = False) -> Iterator[Writing]:
    """Holds the lease of an artifact at a URL while the context is open.

    Raises:
        BusyError: another process holds it.
        ResourceError: the place cannot be written.
    """
    path, name = lock_path(folder), folder.rpartition("/")[2]
    lease = _Lease(Holder.this_process({}), uuid.uuid4().hex, time.time(), _this_machine())
    while not objects.create(path, lease.content()):
        try:
            found = _Lease.parse(objects.read(path))
        except FileNotFoundError:
            continue  # given back just now
        _require_abandoned(found, name, reporter, break_lock)
        objects.remove(path)
    held = Writing(objects, path, name, lease)
    try:
        held.look()  # of two that took over at once, one goes on
        held.check()
        yield held
    finally:
        held.end()


def remove_abandoned(objects: Objects, folder: str) -> None:
    """Removes the lock that was left with a complete artifact, which nobody will take over any more.

    Raises:
        ResourceError: the place does not answer.
    """
    with contextlib.suppress(FileNotFoundError):
        found = _Lease.parse(objects.read(lock_path(folder)))
        if found is None or found.age() >= ABANDONED or _has_ended(found):
            objects.remove(lock_path(folder))


def _require_abandoned(found: _Lease | None, name: str, reporter: Reporter, break_lock: bool) -> None:
    if found is None:
        reporter.warn(f"the lock of {name} cannot be read; taken over")
        return
    if _has_ended(found):
        reporter.warn(f"{name}: {found.holder} ended without finishing; going on from what it left")
        return
    if break_lock:
        reporter.warn(f"the lock of {name} was broken: {found.holder}")
        return
    age = found.age()
    if age < ABANDONED:
        raise _busy(name, found, age)
    reporter.warn(f"{name}: {found.holder} gave no sign for {age:,.0f} s; going on from what it left")


def _busy(name: str, found: _Lease, age: float) -> BusyError:
    return catalogue.FOLDER_BUSY(
        f"{name} is being written by {found.holder} (seen {age:,.0f} s ago); wait until it has ended. If it was "
        f"killed, this command can begin in {ABANDONED - age:,.0f} s, or now with `nsae --break-lock`"
    )


def _has_ended(lease: _Lease) -> bool:
    """Whether its holder ran on this machine, and runs no more."""
    return lease.machine is not None and lease.machine == _this_machine() and not is_alive(lease.holder.pid)


def _this_machine() -> str | None:
    """What tells this machine, since it was started, and this container from others; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:16]
    except OSError:
        return None
