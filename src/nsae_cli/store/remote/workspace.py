"""`--workspace URL`, and artifacts that are named by a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsae_cli import catalogue
from nsae_cli.errors import ArtifactError
from nsae_cli.launch import ALONE, Placement
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit, presence
from nsae_cli.store.lock import Turn
from nsae_cli.store.progress import is_progress
from nsae_cli.store.remote import lease, progress
from nsae_cli.store.remote.mirror import MARKS, NOTES, Mirror, is_busy, is_safe
from nsae_cli.store.remote.objects import Objects, RemoteFile
from nsae_cli.store.remote.places import local_copy, normal
from nsae_cli.store.remote.uploads import Uploads
from nsae_cli.store.workspace import Artifact, Kind, Workspace

_KINDS = frozenset(kind.folder for kind in Kind)


@dataclass(frozen=True)
class RemoteWorkspace(Workspace):
    """A workspace at a URL: `root` is its local copy, in which commands work as in any other.

    Attributes:
        mirror: the copy and its URL.
        uploads: takes to the URL what is made in the copy.
    """

    mirror: Mirror = field(kw_only=True)
    uploads: Uploads = field(kw_only=True)

    @classmethod
    def at_url(cls, url: str, *, break_lock: bool = False) -> RemoteWorkspace:
        """The workspace at a URL. Nothing is asked of it before `open`.

        Raises:
            UsageError: no URL that a package opens.
            ResourceError: the package for it is missing.
        """
        mirror = _mirror(url)
        return cls(mirror.local, break_lock, mirror=mirror, uploads=Uploads(mirror))

    @property
    def place(self) -> str:
        """Its URL, for people."""
        return self.mirror.objects.url

    def shown(self, path: Path) -> str:
        """The URL of a file or folder of the workspace."""
        if path == self.root or self.root in path.parents:
            return self.mirror.objects.shown(self._name(path))
        return str(path)

    def open(self) -> None:
        """Brings the JSON of every artifact, and from now on uploads what is made.

        The JSON of an artifact that another process of this machine is writing is left alone.

        Raises:
            ResourceError: the place does not answer.
        """
        commit.make_folder(self.root)
        commit.observer = self.uploads.committed
        self.mirror.listing = self.mirror.objects.files()
        artifacts: dict[str, dict[str, RemoteFile]] = {}
        for path, found in self.mirror.listing.items():
            parts = path.split("/")
            if parts[0] in _KINDS and len(parts) > 2 and is_safe(path):
                artifacts.setdefault("/".join(parts[:2]), {})["/".join(parts[2:])] = found
        for folder in [folder for kind in _KINDS for folder in (self.root / kind).glob("*/")]:
            if self._name(folder) not in artifacts and not folder.name.startswith(".") and not is_busy(folder):
                commit.remove_folder(folder)
        for name, files in artifacts.items():
            if not is_busy(self.root / name):
                self._bring_marks(name, files)

    def _bring_marks(self, name: str, files: dict[str, RemoteFile]) -> None:
        commit.make_folder(self.root / name)
        progress.drop_marks(self.root / name, files)
        for path, found in files.items():
            parts = path.split("/")
            if len(parts) <= 2 and parts[-1] in (*MARKS, *NOTES):
                try:
                    self.mirror.adopt(f"{name}/{path}", found)
                except ArtifactError as error:
                    presence.reporter.warn(str(error))

    @contextlib.contextmanager
    def writing(
        self,
        folder: Path,
        reporter: Reporter,
        worker: Placement = ALONE,
        software: Mapping[str, str] | None = None,
    ) -> Iterator[Turn]:
        """As `Workspace.writing`, on every machine: and first brings what the URL has of the artifact.

        Raises:
            UsageError: nothing can be written there, or not by several workers.
            BusyError: another process is writing there.
            ResourceError: the workspace cannot be written.
        """
        self.uploads.require_writable()
        if not worker.alone:
            raise catalogue.REFUSED_COMBINATION(
                f"--workspace {self.place}: workers that share a store ({worker}) need a folder that all of them see; "
                f"give one as --workspace and copy the store, or start one process"
            )
        name, objects = self._name(folder), self.mirror.objects
        with (
            super().writing(folder, reporter, worker, software) as turn,
            lease.writing(objects, name, reporter, break_lock=self.break_lock) as held,
        ):
            progress.resume(self.mirror, name)
            self.uploads.begin(name, held)
            try:
                yield turn
            finally:
                self.uploads.end(name)

    def tidy(self, folder: Path, reporter: Reporter, unneeded: Sequence[Path] = (), worker: Placement = ALONE) -> None:
        """As `Workspace.tidy`, at the URL too."""
        name = self._name(folder)
        inside = [path for path in self.mirror.listing if path.startswith(f"{name}/")]
        left = [
            path for path in inside if is_progress(path.removeprefix(f"{name}/")) or f"/{progress.CHECKPOINTS}/" in path
        ]
        if left and worker.alone and not self.mirror.objects.read_only:
            with self.writing(folder, reporter):
                for path in sorted(left, key=lambda path: not path.endswith(progress.FILES_JSON)):
                    self.mirror.objects.remove(path)
        elif lease.lock_path(name) in self.mirror.listing and not self.mirror.objects.read_only:
            lease.remove_abandoned(self.mirror.objects, name)
        super().tidy(folder, reporter, unneeded, worker)

    def fetch(self, folder: Path) -> None:
        """Brings everything of an artifact anew, as it is at the URL, for `nsae verify`."""
        if not is_busy(folder):
            self.mirror.fetch_all(self._name(folder))

    def forget(self, folder: Path) -> None:
        """Drops the local copy of an artifact: it is damaged at the URL."""
        commit.remove_folder(folder)

    def size(self, folder: Path) -> int:
        """Bytes of an artifact at the URL."""
        inside = f"{self._name(folder)}/"
        return sum(found.size or 0 for path, found in self.mirror.listing.items() if path.startswith(inside))

    def _name(self, path: Path) -> str:
        name = self.mirror.path_of(path)
        return "" if name == "." else name


def find_at_url(kind: Kind, url: str) -> list[Artifact]:
    """The artifact at a URL, or all cells of an SAE group there: its JSON is brought, its data when they are read.

    Raises:
        UsageError: there is nothing.
        ArtifactError: it is not complete, or damaged.
        ResourceError: the place does not answer, or the package for it is missing.
    """
    root, folder = _split(url, kind)
    mirror = _mirror(root)
    shown = mirror.objects.shown(folder)
    marks = {path: mirror.objects.find(path) for path in (_join(folder, kind.mark),)}
    if None in marks.values():
        files = mirror.objects.files(folder)
        if not files:
            raise catalogue.NOT_FOUND(f"there is nothing at {shown}; check the URL and your rights there")
        cells = [path for path in files if path.removeprefix(folder).strip("/").count("/") == 1 and is_safe(path)]
        marks = {path: files[path] for path in sorted(cells) if kind is Kind.SAE and path.endswith(f"/{kind.mark}")}
        if not marks:
            raise catalogue.UNFINISHED(
                f"{shown} holds no {kind.mark}: it is not finished or not from `nsae {kind.command}`; run the same "
                f"command again"
            )
    found = []
    for path, file in marks.items():
        assert file is not None
        mirror.adopt(path, file)
        place = (mirror.local / path).parent
        found.append(Artifact(kind, place.name, place))
    return found


def fetch_at_url(url: str) -> Path:
    """Brings everything at a URL, whatever artifact it is, and returns where it is now: for `nsae verify`.

    Raises:
        UsageError: there is nothing.
        ResourceError: the place does not answer.
    """
    root, folder = _split(url)
    mirror = _mirror(root)
    if not mirror.objects.files(folder):
        raise catalogue.NOT_FOUND(f"there is nothing at {mirror.objects.shown(folder)}; check the URL")
    mirror.fetch_all(folder)
    return mirror.local / folder


def _mirror(url: str) -> Mirror:
    """The copy of what is at a URL; one for each in a command."""
    local = local_copy(url)
    known = presence.source_of(local)
    if isinstance(known, Mirror):
        return known
    mirror = Mirror(Objects(url), local, presence.reporter)
    presence.register(local, mirror)
    return mirror


def _split(url: str, kind: Kind | None = None) -> tuple[str, str]:
    """The URL of what holds an artifact (its workspace, where it looks like one) and the artifact's path from there."""
    protocol, _, rest = normal(url).partition("://")
    parts = rest.split("/")
    kinds = {kind.folder} if kind is not None else _KINDS
    for depth in (2, 3):
        if len(parts) > depth and parts[-depth] in kinds:
            return f"{protocol}://{'/'.join(parts[:-depth])}", "/".join(parts[-depth:])
    if len(parts) == 1:
        return normal(url), ""
    return f"{protocol}://{'/'.join(parts[:-1])}", parts[-1]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
