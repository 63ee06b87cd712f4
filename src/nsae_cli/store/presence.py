"""Files that belong here and are somewhere else yet: brought when they are first read.

An artifact that was named by a URL has its JSON on this disk; its data files are still at the URL. Whatever reads a
data file calls `bring` before. Without a URL in a command nothing is registered, and the calls do nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from nsae_cli.reporter import Reporter, SilentReporter


class Source(Protocol):
    """Where the files of a folder can be had from; `store.remote` implements it."""

    def bring(self, path: Path) -> None:
        """Puts the file at `path`, checked, unless it is there or nothing is known of it."""

    def has(self, path: Path, size: int | None) -> bool:
        """Whether a file of that many bytes can be had, without bringing it."""


_sources: dict[Path, Source] = {}
#: Is told what is being fetched.
reporter: Reporter = SilentReporter()


def register(folder: Path, source: Source) -> None:
    """From now on what is missing below `folder` (absolute) comes from `source`."""
    _sources[folder] = source


def source_of(folder: Path) -> Source | None:
    """Where what is missing below exactly this folder comes from; None where it comes from nowhere."""
    return _sources.get(folder)


def begin(told: Reporter) -> None:
    """A command begins: nothing comes from elsewhere any more, and `told` hears of what is fetched from now on."""
    global reporter
    _sources.clear()
    reporter = told


def bring(path: Path) -> None:
    """Puts a file where it is looked for, if it can be had from somewhere.

    Raises:
        ArtifactError: it is not what was written.
        ResourceError: it could not be fetched.
    """
    for folder, source in list(_sources.items()):
        if folder in path.parents:
            source.bring(path)


def is_there(path: Path, size: int | None) -> bool:
    """Whether a file of that many bytes is on this disk, or can be had without making it again."""
    if path.is_file():
        return path.stat().st_size == size
    return any(folder in path.parents and source.has(path, size) for folder, source in list(_sources.items()))
