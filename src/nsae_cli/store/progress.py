"""What is durable of a store that is being written: ``progress.jsonl``, and one more file for each further worker.

The first line is the resolved configuration, each other line a durable shard; each line is sealed. Worker 0, and a
command that works alone, writes ``progress.jsonl``, worker 3 ``progress-3.jsonl``. Nobody writes into another's file,
everybody reads them all: who made a shard makes no difference.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nsae_cli import catalogue
from nsae_cli.errors import ArtifactError
from nsae_cli.store import commit, presence
from nsae_cli.store.manifest import ShardEntry
from nsae_cli.store.seal import is_sealed, seal, seal_fits
from nsae_cli.store.shards import describe_changes

PROGRESS = "progress.jsonl"

_FILE = re.compile(r"progress(?:-(\d+))?\.jsonl")
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


def progress_name(worker: int) -> str:
    """The file of a worker's own."""
    return PROGRESS if worker == 0 else f"progress-{worker}.jsonl"


def is_progress(name: str) -> bool:
    """Whether a file of a store is such a file, by its name."""
    return _FILE.fullmatch(name) is not None


def progress_files(folder: Path) -> list[Path]:
    """The files that are there, by the number of their worker."""
    found = {path: _FILE.fullmatch(path.name) for path in folder.glob("progress*.jsonl")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1] or 0))  # type: ignore[index]


@dataclass(frozen=True)
class Progress:
    """What one file says.

    Attributes:
        config: the configuration that the store was begun with.
        entries: the shards by number, of the lines that are what was written.
        whole: whether every line is.
    """

    config: dict[str, Any]
    entries: dict[int, ShardEntry]
    whole: bool


def progress_text(config: dict[str, Any], entries: Iterable[ShardEntry]) -> str:
    """The content of such a file."""
    first = commit.to_json(seal({"config": config}), indent=None)
    return "".join(f"{line}\n" for line in (first, *map(progress_line, entries)))


def progress_line(entry: ShardEntry) -> str:
    """The line of a durable shard, without its end."""
    return commit.to_json(seal(entry.model_dump()), indent=None)


def read_progress(path: Path) -> Progress:
    """What one file says.

    Raises:
        ArtifactError: the first line, the configuration, is damaged.
        FileNotFoundError: it is not there.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    try:
        first = commit.parse_json(lines[0], path)
        config = first["config"]
        if not seal_fits(first) or not isinstance(config, dict):
            raise ValueError("its checksum differs")
    except (IndexError, ValueError, KeyError, TypeError, ArtifactError) as error:
        raise catalogue.PROGRESS_DAMAGED(
            f"{path} is damaged; delete the folder {path.parent.name} and run again"
        ) from error
    entries: dict[int, ShardEntry] = {}
    for line in lines[1:]:
        with contextlib.suppress(ValueError, ArtifactError):
            document = commit.parse_json(line, path)
            if is_sealed(document) and seal_fits(document):
                entry = ShardEntry.model_validate(document)
                if (named := _SHARD_NAME.fullmatch(entry.file)) is not None:
                    entries[int(named[1])] = entry
    return Progress(config, entries, len(entries) == len(lines) - 1 and text.endswith("\n"))


def recover_progress(path: Path, config: dict[str, Any]) -> dict[int, ShardEntry]:
    """The durable shards of an interrupted run, by number, as its file says; the file is written anew without others.

    A shard whose line is torn or damaged, or whose file is gone, is left out, to be written again.

    Raises:
        ArtifactError: the first line, the configuration, is damaged.
        UsageError: the store was begun with another configuration.
    """
    progress = read_progress(path)
    _require_same(progress, path, config)
    there = {index: entry for index, entry in progress.entries.items() if _is_there(path.parent, entry)}
    if len(there) != len(progress.entries) or not progress.whole:
        commit.write_text(path, progress_text(progress.config, (there[index] for index in sorted(there))))
    return there


def durable_shards(folder: Path, config: dict[str, Any] | None = None) -> dict[int, ShardEntry]:
    """The durable shards of a store by number, whoever has made them.

    Args:
        folder: the store's.
        config: of the run that asks; None where any is right.

    Raises:
        ArtifactError: the first line of a file, the configuration, is damaged.
        UsageError: the store was begun with another configuration.
    """
    read = []
    for path in progress_files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile by the worker that completed the store
            progress = read_progress(path)
            if config is not None:
                _require_same(progress, path, config)
            read.append(progress)
    return {index: entry for index, entry in merged(folder, read).items() if _is_there(folder, entry)}


def merged(folder: Path, progress: Iterable[Progress]) -> dict[int, ShardEntry]:
    """The shards of several files by number.

    Of two different lines for one shard the one counts that says what is in its file now: an earlier file was lost or
    dropped, and another worker made the shard again.
    """
    found: dict[int, ShardEntry] = {}
    for one in progress:
        for index, entry in one.entries.items():
            if found.get(index, entry) == entry or _is_what_is_there(folder, entry):
                found[index] = entry
    return found


def _require_same(progress: Progress, path: Path, config: dict[str, Any]) -> None:
    if progress.config != config:
        changed = describe_changes(progress.config, config)
        raise catalogue.OPTIONS_CHANGED(
            f"{path.parent.name} was begun with other options ({changed}); give the same, or another --name"
        )


def _is_there(folder: Path, entry: ShardEntry) -> bool:
    return presence.is_there(folder / entry.file, entry.bytes)


def _is_what_is_there(folder: Path, entry: ShardEntry) -> bool:
    try:
        with safe_open(folder / entry.file, framework="pt", backend="pread") as file:
            hashes = {name: commit.tensor_sha256(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        commit.refuse_unread(error, folder / entry.file)
        return False
    return hashes == entry.tensors
