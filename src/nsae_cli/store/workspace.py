"""The workspace: one folder that holds every artifact under its kind and name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from nsae_cli import catalogue
from nsae_cli.launch import ALONE, Placement
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit, lock
from nsae_cli.store.remote.places import is_url

DEFAULT_WORKSPACE = "nsae-runs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,119}")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._\-]+")


class Kind(Enum):
    """A kind of artifact: its folder in the workspace, its completion mark and the command that makes it."""

    ACTIVATIONS = ("activations", "manifest.json", "collect")
    NORMS = ("norms", "norms.json", "norms")
    SAE = ("saes", "run.json", "train")
    TOP_NORMS = ("top-norms", "top_norms.json", "analyze-top-norms")
    EVAL = ("evals", "eval.json", "eval")
    FEATURES = ("features", "features.json", "report")
    TABLE = ("tables", "table.json", "compare")
    AUDIT = ("audits", "audit.json", "audit")

    def __init__(self, folder: str, mark: str, command: str) -> None:
        self.folder = folder
        self.mark = mark
        self.command = command


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its kind, its name in the workspace (or its path) and its folder."""

    kind: Kind
    name: str
    path: Path

    def finished_at(self) -> float:
        """When the completion mark was written (seconds since the epoch)."""
        return (self.path / self.kind.mark).stat().st_mtime


@dataclass(frozen=True)
class Workspace:
    """Finds and names artifacts below `root`, and lets one process at a time write into each.

    Attributes:
        root: the folder.
        break_lock: take over locks that another machine has left.
    """

    root: Path
    break_lock: bool = False

    @classmethod
    def at(cls, option: Path | str | None, *, break_lock: bool = False) -> Workspace:
        """The workspace of ``--workspace``, else of ``NSAE_WORKSPACE``, else ``./nsae-runs``; a folder or a URL.

        Raises:
            UsageError: a URL that nobody can open.
            ResourceError: the package for a URL is missing.
        """
        place = option or os.environ.get("NSAE_WORKSPACE") or DEFAULT_WORKSPACE
        if is_url(place):
            from nsae_cli.store.remote.workspace import RemoteWorkspace

            return RemoteWorkspace.at_url(str(place), break_lock=break_lock)
        return cls(Path(place), break_lock)

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return str(self.root)

    def shown(self, path: Path) -> str:
        """Where a file or folder of the workspace is, for people."""
        return str(path)

    def open(self) -> None:
        """To be called before anything is looked for; a folder needs no opening."""

    def fetch(self, folder: Path) -> None:
        """Makes sure that an artifact's folder has everything of it, as it is now where it belongs."""

    def forget(self, folder: Path) -> None:
        """Drops what is only a copy of a damaged artifact; nothing in a folder is."""

    def size(self, folder: Path) -> int:
        """Bytes of an artifact."""
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def writing(
        self,
        folder: Path,
        reporter: Reporter,
        worker: Placement = ALONE,
        software: Mapping[str, str] | None = None,
    ) -> contextlib.AbstractContextManager[lock.Turn]:
        """Keeps every other process from writing into an artifact's folder while the context is open.

        Args:
            folder: the artifact's.
            reporter: see `lock.writing`.
            worker: which of several that share the folder this process is: the others of its job may write there too.
            software: what all of these must have alike.

        Raises:
            BusyError: another process is writing there.
            UsageError: a worker of the same job has other software.
            ResourceError: the workspace cannot be written.
        """
        return lock.writing(folder, reporter, break_lock=self.break_lock, worker=worker, software=software)

    def tidy(self, folder: Path, reporter: Reporter, unneeded: Sequence[Path] = (), worker: Placement = ALONE) -> None:
        """Removes what a process left in or beside a complete artifact because it was killed in its last moment.

        Args:
            folder: the artifact's.
            reporter: see `writing`.
            unneeded: files and folders there that no complete artifact has; its locks are always looked at.
            worker: as in `writing`; several may tidy one after the other.

        Raises:
            BusyError: there is something to remove, and another process is writing there.
        """
        with lock.Turn(folder, worker).taken():
            if unneeded:
                with contextlib.nullcontext() if not worker.alone else self.writing(folder, reporter):
                    for path in unneeded:
                        (commit.remove_folder if path.is_dir() else commit.remove_file)(path)
            lock.remove_abandoned(folder)

    def folder(self, kind: Kind, name: str) -> Path:
        """Where the artifact `name` of `kind` lives, whether it exists or not."""
        return self.root / kind.folder / name

    def complete(self, kind: Kind) -> Iterator[Artifact]:
        """All complete artifacts of a kind, newest first. An SAE group yields its cells as NAME/CELL."""
        found = []
        for mark in (
            *self.root.glob(f"{kind.folder}/*/{kind.mark}"),
            *self.root.glob(f"{kind.folder}/*/*/{kind.mark}"),
        ):
            found.append(Artifact(kind, mark.parent.relative_to(self.root / kind.folder).as_posix(), mark.parent))
        yield from sorted(found, key=lambda artifact: (-artifact.finished_at(), artifact.name))

    def unfinished(self, kind: Kind) -> Iterator[Path]:
        """Folders of a kind that hold no complete artifact."""
        done = {artifact.path for artifact in self.complete(kind)}
        for folder in sorted((self.root / kind.folder).glob("*/")):
            if folder not in done and not any(folder in path.parents for path in done):
                yield folder

    def newest(self, kind: Kind) -> Artifact:
        """The complete artifact whose completion mark is the newest.

        Raises:
            UsageError: there is none.
        """
        for artifact in self.complete(kind):
            return artifact
        raise catalogue.WORKSPACE_EMPTY(
            f"no complete {kind.folder} in {self.place}; run `nsae {kind.command}` first, or name one"
        )

    def find(self, kind: Kind, reference: str) -> list[Artifact]:
        """What a URL, a name in the workspace, else a path, stands for: one artifact, or all cells of an SAE group.

        Raises:
            UsageError: there is nothing of that name.
            ArtifactError: it exists but is not complete.
        """
        if not reference.strip():
            raise catalogue.NAME_INVALID(f"the name of {kind.folder} is empty; give a name or a path, or leave it out")
        if is_url(reference):
            from nsae_cli.store.remote.workspace import find_at_url

            return find_at_url(kind, reference)
        for folder in (self.folder(kind, reference), Path(reference)):
            if not os.path.isdir(folder):  # False too for what can be no name of a file, such as one too long
                continue
            if (folder / kind.mark).is_file():
                return [Artifact(kind, self.name_of(kind, folder), folder)]
            if kind is Kind.SAE:
                cells = sorted(mark.parent for mark in folder.glob(f"*/{kind.mark}"))
                if cells:
                    return [Artifact(kind, self.name_of(kind, cell), cell) for cell in cells]
            if kind is Kind.ACTIVATIONS:
                return [Artifact(kind, self.name_of(kind, folder), folder)]  # opening it says what is wrong
            raise catalogue.UNFINISHED(
                f"{folder} holds no {kind.mark}: it is not finished or not from `nsae {kind.command}`; "
                f"run the same command again"
            )
        known = ", ".join(artifact.name for artifact in self.complete(kind)) or "none"
        raise catalogue.NOT_FOUND(
            f"no {kind.folder} named {reference[:80]!r} in {self.place} and no such path; there are: {known}"
        )

    def find_recorded(self, kind: Kind, name: object) -> list[Artifact]:
        """As `find`, for a name that an artifact's file gives: it may not lead anywhere else.

        Raises:
            UsageError: there is nothing of that name, or it is none.
        """
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise catalogue.NOT_FOUND(f"{str(name)[:60]!r} is no name of {kind.folder}; name one that is there")
        return self.find(kind, name)

    def name_of(self, kind: Kind, folder: Path) -> str:
        """The name of a folder in the workspace, NAME or NAME/CELL; elsewhere the folder's own."""
        base = (self.root / kind.folder).resolve()
        resolved = folder.resolve()
        return resolved.relative_to(base).as_posix() if base in resolved.parents else folder.name


def check_name(name: str) -> str:
    """A name that can be given with ``--name``: letters, digits, ``.``, ``_`` and ``-``.

    Raises:
        UsageError: anything else, path separators and newlines included.
    """
    if not _NAME.fullmatch(name):
        raise catalogue.NAME_INVALID(
            f"--name {name[:60]!r} is not a name; use letters, digits, '.', '_' and '-', at most 120"
        )
    return name


def as_name(text: str) -> str:
    """A text with a ``-`` for whatever cannot stand in a name; its ends are the caller's."""
    return _NOT_IN_A_NAME.sub("-", text)


def name_from(text: str) -> str:
    """A name for an artifact, from what it is made of."""
    return check_name(as_name(text).strip("-._")[:120] or "sae")


def config_hash(config: dict[str, Any]) -> str:
    """Six hex digits that identify a resolved configuration."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:6]


def log_timing(folder: Path, event: str, **values: Any) -> None:
    """Appends to the artifact's timings.jsonl, the one file that may hold times, rates and hosts."""
    line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}, ensure_ascii=False)
    with (folder / "timings.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
