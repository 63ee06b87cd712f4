"""The local copy of what is below a URL: an artifact's JSON at once, its data files when they are first read.

What is fetched gets its name by a rename, after its content was compared with the hashes that the artifact's JSON has
of it. A copy whose JSON is no longer the one at the URL is dropped whole: its data are of another version.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import ArtifactError
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.lock_file import State, lock_path, look
from nsae_cli.store.manifest import MANIFEST, ShardEntry, read_manifest
from nsae_cli.store.remote.objects import Objects, RemoteFile
from nsae_cli.store.seal import FILES, is_plain_name, seal_fits
from nsae_cli.store.workspace import Kind

MARKS = frozenset(kind.mark for kind in Kind)
#: Other JSON that lies beside marks and says what is there.
NOTES = ("group.json",)


@dataclass(frozen=True)
class _Expected:
    """What a file should be: its bytes and its tensors' hashes, or its own hash; nothing where nobody recorded it."""

    size: int | None = None
    tensors: dict[str, str] | None = None
    sha256: str | None = None

    @property
    def known(self) -> bool:
        """Whether its content can be checked."""
        return self.tensors is not None or self.sha256 is not None

    def difference(self, path: Path) -> str | None:
        """In what a file differs; None where it is what was written."""
        if self.size is not None and (size := path.stat().st_size) != self.size:
            return f"{size:,} bytes, expected {self.size:,}"
        if self.sha256 is not None and commit.file_sha256(path) != self.sha256:
            return "its content is not what was written (SHA-256 differs)"
        if self.tensors is None:
            return None
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in self.tensors:
                    if commit.tensor_sha256(file.get_tensor(name)) != self.tensors[name]:
                        return f"the content of {name} is not what was written (SHA-256 differs)"
        except (SafetensorError, OSError) as error:
            commit.refuse_unread(error, path)
            return f"not a readable safetensors file ({str(error).splitlines()[0]})"
        return None


@dataclass
class Mirror:
    """The copy, in `local`, of what is below the URL of `objects`.

    Args:
        objects: the files at the URL.
        local: the copy's folder.
        reporter: is told what is fetched.
    """

    objects: Objects
    local: Path
    reporter: Reporter
    #: Files that were at the URL when an unfinished artifact was looked at, by their paths from it.
    known: dict[str, RemoteFile] = field(default_factory=dict)
    #: All files that were at the URL when the command began, where it asked.
    listing: dict[str, RemoteFile] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _told: set[Path] = field(default_factory=set)
    _current: set[Path] = field(default_factory=set)
    #: By store, the version of its manifest and what that says.
    _manifests: dict[Path, tuple[tuple[int, ...], dict[str, _Expected]]] = field(default_factory=dict)

    def path_of(self, local: Path) -> str:
        """Path from the URL of a file or folder of the copy."""
        return local.relative_to(self.local).as_posix()

    # Marks

    def adopt(self, path: str, found: RemoteFile) -> None:
        """Puts an artifact's JSON into the copy and, if it is another than was there, drops what was fetched for it.

        Raises:
            ArtifactError: it is not what was written, as it came twice.
            ResourceError: it could not be read.
        """
        local = self.local / path
        noted = local.parent / f".{local.name}.version"
        if local.is_file() and noted.is_file() and noted.read_text(encoding="ascii") == found.version:
            return
        content = self._read_json(path, found)
        if not local.is_file() or local.read_bytes() != content:
            if local.name in MARKS:
                _drop_data(local.parent)
            commit.make_folder(local.parent)

            def write(temporary: Path) -> None:
                temporary.write_bytes(content)

            _place(local, write)
        if found.written is not None:  # which artifact is the newest goes by this
            os.utime(local, (found.written, found.written))
        noted.write_text(found.version, encoding="ascii")

    def _read_json(self, path: str, found: RemoteFile) -> bytes:
        if found.size is not None and found.size > commit.MAX_JSON_BYTES:
            raise catalogue.JSON_DAMAGED(
                f"{self.objects.shown(path)}: {found.size:,} bytes, an artifact's JSON has at most "
                f"{commit.MAX_JSON_BYTES:,}; the file is damaged, make the artifact again"
            )
        problem = ""
        for _ in range(2):  # what was damaged on its way is whole the next time
            content = self.objects.read(path)
            try:
                if seal_fits(commit.parse_json(content.decode("utf-8", errors="replace"), Path(path))):
                    return content
                problem = "its checksum differs"
            except ArtifactError as error:
                problem = str(error).removeprefix(f"{path} ").partition("; ")[0]
        raise catalogue.REMOTE_DAMAGED(
            f"{self.objects.shown(path)} is not what was written ({problem}); run the command that made it again, "
            f"after deleting this object"
        )

    # Data files

    def bring(self, path: Path) -> None:
        """See `presence.Source`."""
        expected = self._expected(path)
        if expected is None:
            return
        with self._lock:
            if path.is_file() and (expected.known or path in self._current):
                return
            name = self.path_of(path)
            if not expected.known:  # of another tool: no hashes, so that only the place can say what has changed
                self._bring_unrecorded(path, name, expected)
                self._current.add(path)
            elif self.known.get(name) is not None or self.objects.find(name) is not None:
                self._fetch(path, name, expected)

    def _bring_unrecorded(self, path: Path, name: str, expected: _Expected) -> None:
        found, noted = self.objects.find(name), path.parent / f".{path.name}.version"
        if found is None:
            return
        if path.is_file() and noted.is_file() and noted.read_text(encoding="ascii") == found.version:
            return
        self._fetch(path, name, _Expected(size=found.size if expected.size is None else expected.size))
        noted.write_text(found.version, encoding="ascii")

    def has(self, path: Path, size: int | None) -> bool:
        """See `presence.Source`."""
        found = self.known.get(self.path_of(path))
        return found is not None and found.size == size

    def _fetch(self, path: Path, name: str, expected: _Expected) -> None:
        interrupt.stop_if_requested("stopped while fetching; the same command goes on")
        self._tell(path)
        problem: str | None = None

        def write(temporary: Path) -> None:
            nonlocal problem
            for _ in range(2):  # what was damaged on its way is whole the next time
                self.objects.download(name, temporary)
                problem = expected.difference(temporary)
                if problem is None:
                    return
            raise catalogue.REMOTE_DAMAGED(
                f"{self.objects.shown(name)}: {problem}; it is damaged at the URL, check the others there with "
                f"`nsae verify {self.objects.shown(name).rpartition('/')[0]}`"
            )

        try:
            _place(path, write)
        except FileNotFoundError as error:
            raise catalogue.SHARD_MISSING(
                f"{self.objects.shown(name)}: the file is missing; run the command that made the artifact again"
            ) from error

    def _tell(self, path: Path) -> None:
        """Says once per artifact what is being fetched and where to."""
        if path.parent not in self._told:
            self._told.add(path.parent)
            url = self.objects.shown(self.path_of(path.parent))
            self.reporter.note(f"fetching from {url} as it is read, into {path.parent}")

    def _expected(self, path: Path) -> _Expected | None:
        """What an artifact's JSON says of a file; None where it does not name it, or is not there."""
        if (path.parent / MANIFEST).is_file():
            return self._shards(path.parent).get(path.name)
        for mark in sorted(MARKS - {MANIFEST}):
            if (path.parent / mark).is_file():
                document = commit.read_json(path.parent / mark)
                files = document.get(FILES) if isinstance(document, dict) else None
                if not isinstance(files, dict):
                    return _Expected()  # of an older nsae
                if is_plain_name(path.name) and isinstance(files.get(path.name), str):
                    return _Expected(sha256=files[path.name])
        return None

    def _shards(self, folder: Path) -> dict[str, _Expected]:
        """What a store's manifest says of its shards; read once per version of it, not once per shard."""
        status = (folder / MANIFEST).stat()
        version = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._manifests.get(folder, ((), {}))[0] != version:
            entries = read_manifest(folder)[0].shards
            self._manifests[folder] = version, {entry.file: of_shard(entry) for entry in entries}
        return self._manifests[folder][1]

    # Whole folders

    def fetch_all(self, folder: str) -> None:
        """Puts every file below a folder of the URL into the copy as it is, in place of what is there.

        For `nsae verify`, which says itself what is wrong with them.

        Raises:
            ResourceError: one could not be read.
        """
        local = self.local / folder
        with contextlib.suppress(FileNotFoundError):
            _drop_data(local, everything=True)
        files = {path: found for path, found in self.objects.files(folder).items() if is_safe(path)}
        size = sum(found.size or 0 for found in files.values())
        self.reporter.note(f"fetching {len(files):,} files, {size / 2**20:,.1f} MiB, of {self.objects.shown(folder)}")
        for path in files:
            interrupt.stop_if_requested("stopped while fetching; nothing was changed")
            target = self.local / path
            commit.make_folder(target.parent)
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                _place(target, partial(self.objects.download, path))

    def fetch_folder(self, folder: str, files: dict[str, str | None]) -> str | None:
        """Puts files with known hashes into a folder that gets its name when all are there.

        Args:
            folder: path from the URL, and of the copy.
            files: by name the SHA-256, or None where it is not known.

        Returns:
            What is wrong with one of them; None where the folder is there.

        Raises:
            ResourceError: one could not be read.
        """
        final = self.local / folder
        temporary = final.parent / f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"
        commit.make_folder(temporary)
        try:
            for name, sha256 in files.items():
                interrupt.stop_if_requested("stopped while fetching; the same command goes on")
                for last in (False, True):
                    try:
                        self.objects.download(f"{folder}/{name}", temporary / name)
                    except FileNotFoundError:
                        return f"{name} is missing"
                    problem = _Expected(sha256=sha256).difference(temporary / name)
                    if problem is None:
                        break
                    if last:
                        return f"{name}: {problem}"
            temporary.rename(final)
        finally:
            if temporary.exists():
                commit.remove_folder(temporary)
        return None


def of_shard(entry: ShardEntry) -> _Expected:
    """What a store's manifest says of a shard."""
    return _Expected(entry.bytes, entry.tensors)


def is_safe(path: str) -> bool:
    """Whether a path from a URL, taken from a folder of this disk, stays below it."""
    return all(is_plain_name(part) for part in path.split("/"))


def is_busy(folder: Path) -> bool:
    """Whether a process of this machine is writing into a folder of the copy, or into one in it."""
    return any(look(path)[0] is State.HELD for path in (lock_path(folder), *folder.glob(".*.lock")))


def _place(path: Path, write: Callable[[Path], None]) -> None:
    """Gives what is fetched its name when it is whole. Not flushed to the disk: it can be fetched again."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        write(temporary)
        with commit.disk_errors(path):
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _drop_data(folder: Path, *, everything: bool = False) -> None:
    """Removes files of an older version; folders below are artifacts of their own, unless `everything` goes."""
    if everything:
        commit.remove_folder(folder)
        return
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.is_file() and not path.name.endswith((".lock", ".tmp")):
                path.unlink(missing_ok=True)
