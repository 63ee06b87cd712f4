"""What becomes durable in the local copy goes to the URL: each file in one PUT, what marks it as complete after it.

`commit.observer` calls `Uploads.committed` in the thread that made the file, so that work never runs ahead of what is
safe by more than one shard or checkpoint. A shard goes when its line is in the progress, then the progress; a
checkpoint when it is whole, its files.json last; everything else of an artifact when its completion mark is written,
then the mark. The state of this class is what the URL is known to have.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.store.manifest import MANIFEST, read_manifest
from nsae_cli.store.progress import is_progress, read_progress
from nsae_cli.store.remote.lease import Writing
from nsae_cli.store.remote.mirror import MARKS, NOTES, Mirror
from nsae_cli.store.remote.progress import BEGUN, CHECKPOINTS, FILES_JSON
from nsae_cli.store.workspace import Kind

_KINDS = frozenset(kind.folder for kind in Kind)
#: Folders of files that are complete by themselves.
_SINGLE = ("plots", "reports")
#: Stays on the machine: times, hosts, and what was hashed here.
_LOCAL_ONLY = ("timings.jsonl", "verified.jsonl", "error.log")


@dataclass
class Uploads:
    """Uploads what is committed below a mirror's folder.

    Args:
        mirror: the copy and its URL.
    """

    mirror: Mirror
    #: By path from the URL, size and time of the local file that was uploaded, or found to be there.
    _done: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: By artifact (KIND/NAME) the lease under which this process writes it.
    _leases: dict[str, Writing] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def require_writable(self) -> None:
        """Refuses places to which nsae writes nothing.

        Raises:
            UsageError: this is one.
        """
        if self.mirror.objects.read_only:
            raise catalogue.URL_READ_ONLY(
                f"{self.mirror.objects.url}: nsae writes nothing to {self.mirror.objects.protocol}://; choose another "
                f"--workspace, and name what is there as an input"
            )

    def begin(self, folder: str, lease: Writing) -> None:
        """An artifact is being written from now on; the copy holds what the URL has of it."""
        with self._lock:
            self._leases[folder] = lease
            for path in (self.mirror.local / folder).rglob("*"):
                if path.is_file() and (name := self.mirror.path_of(path)) in self.mirror.known:
                    self._done[name] = _stamp(path)

    def end(self, folder: str) -> None:
        """Nothing more is written into it."""
        with self._lock:
            self._leases.pop(folder, None)

    def committed(self, path: Path) -> None:
        """To be called when a file or folder has got, or lost, its final name.

        Raises:
            ResourceError: it could not be uploaded; the same command goes on from what the URL has.
            BusyError: another process has taken the artifact over.
        """
        path = path.absolute()
        if self.mirror.local not in path.parents:
            return
        parts = self.mirror.path_of(path).split("/")
        if path.name.startswith(".") or path.name.endswith(".tmp") or path.name in _LOCAL_ONLY:
            return
        with self._lock:
            # Reports and plots, figures beside artifacts and group.json are complete by themselves.
            single = parts[0] in _SINGLE or (parts[0] in _KINDS and (len(parts) == 2 or path.name in NOTES))
            if single and path.is_file():
                self.require_writable()
                self._upload(path)
            elif parts[0] in _KINDS and (folder := self._leased(parts)) is not None:
                self._leases[folder].check()
                self._of_artifact(path, parts, parts[folder.count("/") + 1 :])

    def _leased(self, parts: list[str]) -> str | None:
        """The folder, among those that this process writes, in which something is: KIND/NAME or KIND/NAME/CELL."""
        return next((name for end in (3, 2) if (name := "/".join(parts[:end])) in self._leases), None)

    def _of_artifact(self, path: Path, parts: list[str], inside: list[str]) -> None:
        if not path.exists():
            self._remove(parts)
        elif inside and inside[0] == CHECKPOINTS:
            if path.name == BEGUN:
                self._upload(path)
            elif path.is_dir() and path.name.startswith("step-") and len(inside) == 2:
                for file in sorted(path.iterdir(), key=lambda file: file.name == FILES_JSON):
                    self._upload(file)
        elif is_progress(path.name):
            self._upload_progress(path)
        elif path.name in MARKS:
            self._complete(path)
        elif path.is_file() and any((path.parent / mark).exists() for mark in MARKS):
            self._upload(path)  # a figure that was drawn later

    def _upload_progress(self, path: Path) -> None:
        for entry in read_progress(path).entries.values():
            if (shard := path.parent / entry.file).is_file():
                self._upload(shard)
        self._upload(path)

    def _complete(self, mark: Path) -> None:
        """Everything in the mark's folder, then the mark, once all that it names is at the URL."""
        folder = mark.parent
        for file in sorted(folder.iterdir()):
            stays = file.name.startswith(".") or file.name in _LOCAL_ONLY or is_progress(file.name)
            if file.is_file() and file != mark and not stays:
                self._upload(file)
        if mark.name == MANIFEST:
            there = self.mirror.objects.files(self.mirror.path_of(folder))
            for entry in read_manifest(folder)[0].shards:
                found = there.get(self.mirror.path_of(folder / entry.file))
                if found is None or (entry.bytes is not None and found.size != entry.bytes):
                    raise catalogue.REMOTE_FAILED(
                        f"{self.mirror.objects.shown(self.mirror.path_of(folder / entry.file))} is not there as it was "
                        f"uploaded; delete {self.mirror.objects.shown(self.mirror.path_of(folder))} and run again"
                    )
        self._upload(mark)

    def _upload(self, path: Path) -> None:
        name, stamp = self.mirror.path_of(path), _stamp(path)
        if self._done.get(name) != stamp:
            self.mirror.objects.upload(path, name)
            self._done[name] = stamp

    def _remove(self, parts: list[str]) -> None:
        """What was removed here goes from the URL too: a file, or a folder with what makes it complete first."""
        name = "/".join(parts)
        inside = [path for path in self._at_url(parts) if path.startswith(f"{name}/")]
        for path in sorted(inside, key=lambda path: path.rpartition("/")[2] not in (*MARKS, FILES_JSON)):
            self.mirror.objects.remove(path)
            self._done.pop(path, None)
        if not inside:
            self.mirror.objects.remove(name)
            self._done.pop(name, None)

    def _at_url(self, parts: list[str]) -> list[str]:
        # Checkpoints may be there of which the copy knows nothing; a single file needs no listing.
        is_folder = parts[-1] == CHECKPOINTS or parts[-1].startswith("step-") or len(parts) == 2
        return list(self.mirror.objects.files("/".join(parts))) if is_folder else []


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
