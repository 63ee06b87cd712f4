"""What an unfinished artifact has at its URL, put into the local copy, from where the same command goes on.

The URL is the truth: what the copy has beyond it was not uploaded, so that another machine may have made it otherwise;
it is dropped. That is at most one shard or one checkpoint.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from nsae_cli.errors import ArtifactError
from nsae_cli.store import commit
from nsae_cli.store.manifest import ShardEntry
from nsae_cli.store.progress import is_progress, progress_files, read_progress
from nsae_cli.store.remote.mirror import MARKS, NOTES, Mirror
from nsae_cli.store.remote.objects import RemoteFile
from nsae_cli.store.seal import is_plain_name

CHECKPOINTS, BEGUN, FILES_JSON = "checkpoints", "begun.json", "files.json"
_STEP = re.compile(r"step-(\d+)")


def resume(mirror: Mirror, folder: str) -> None:
    """Makes the copy of an artifact's folder what the URL has, finished or not. Both locks are held.

    Raises:
        ArtifactError: what the URL has is damaged.
        ResourceError: it could not be read.
    """
    files = mirror.objects.files(folder)
    mirror.known = dict(files)
    local = mirror.local / folder
    if not files:
        if local.exists():
            commit.remove_folder(local)
        return
    by_name = {path.removeprefix(f"{folder}/"): found for path, found in files.items()}
    drop_marks(local, by_name)
    if not any(name in by_name for name in MARKS):
        _resume_store(mirror, folder, by_name)
    for name, found in by_name.items():
        parts = name.split("/")
        if len(parts) <= 2 and all(map(is_plain_name, parts)) and parts[-1] in (*MARKS, *NOTES):
            mirror.adopt(f"{folder}/{name}", found)
    _resume_training(mirror, folder, by_name)


def drop_marks(folder: Path, at_url: dict[str, RemoteFile]) -> None:
    """Removes completion marks, and the like, that the URL does not have (any more)."""
    for name in (*MARKS, *NOTES):
        for path in (*folder.glob(name), *folder.glob(f"*/{name}")):
            if path.relative_to(folder).as_posix() not in at_url:
                commit.remove_file(path)


def _resume_store(mirror: Mirror, folder: str, by_name: dict[str, RemoteFile]) -> None:
    """Shards of the copy stay exactly where the URL's progress has the same of them."""
    local = mirror.local / folder
    ours = _recorded_here(local)
    for path in progress_files(local):
        commit.remove_file(path)
    recorded: dict[str, ShardEntry] = {}
    for name in filter(is_progress, by_name):
        commit.make_folder(local)
        recorded |= _fetch_progress(mirror, f"{folder}/{name}")
    for shard in local.glob("shard-*.safetensors"):
        if shard.name not in recorded or ours.get(shard.name) != recorded[shard.name]:
            commit.remove_file(shard)


def _fetch_progress(mirror: Mirror, path: str) -> dict[str, ShardEntry]:
    """The shards in a progress file, which is put into the copy. What came damaged is read once more."""
    local = mirror.local / path
    for _ in range(2):
        commit.write_bytes(local, mirror.objects.read(path))
        with contextlib.suppress(ArtifactError):
            if read_progress(local).whole:
                break
    return {entry.file: entry for entry in read_progress(local).entries.values()}


def _recorded_here(local: Path) -> dict[str, ShardEntry]:
    """What the copy says of its shards, by file."""
    found: dict[str, ShardEntry] = {}
    for path in progress_files(local):
        with contextlib.suppress(ArtifactError):
            found |= {entry.file: entry for entry in read_progress(path).entries.values()}
    return found


def _resume_training(mirror: Mirror, folder: str, by_name: dict[str, RemoteFile]) -> None:
    """The newest whole checkpoint at the URL; the others there are removed."""
    local = mirror.local / folder / CHECKPOINTS
    begun = f"{CHECKPOINTS}/{BEGUN}"
    if begun not in by_name:
        if local.exists():
            commit.remove_folder(local)
        return
    mirror.adopt(f"{folder}/{begun}", by_name[begun])
    steps = _steps(by_name)
    chosen: int | None = None
    problems = []
    for step in sorted(steps, reverse=True):
        if FILES_JSON not in steps[step]:
            continue  # it was being uploaded when its run ended
        place = f"{folder}/{CHECKPOINTS}/step-{step}"
        problem = _fetch_step(mirror, place) and _fetch_step(mirror, place)  # it may have come damaged
        if problem is None:
            chosen = step
            break
        problems.append(f"step-{step} ({problem})")
    if problems:
        instead = "beginning again" if chosen is None else f"going on from step-{chosen}"
        mirror.reporter.warn(f"damaged checkpoint {', '.join(problems)} at the URL: {instead}")
    for path in local.glob("step-*"):
        if path.name != f"step-{chosen}":
            commit.remove_folder(path)
    for step in steps:
        if step != chosen:
            remove_step(mirror, f"{folder}/{CHECKPOINTS}/step-{step}", steps[step])


def _steps(by_name: dict[str, RemoteFile]) -> dict[int, list[str]]:
    """The files of every checkpoint at the URL."""
    found: dict[int, list[str]] = {}
    for name in by_name:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == CHECKPOINTS and (step := _STEP.fullmatch(parts[1])):
            found.setdefault(int(step[1]), []).append(parts[2])
    return found


def _fetch_step(mirror: Mirror, folder: str) -> str | None:
    """Puts a checkpoint into the copy unless the same is there; what is wrong with it, or None."""
    content = mirror.objects.read(f"{folder}/{FILES_JSON}")
    local = mirror.local / folder
    if (local / FILES_JSON).is_file():
        if (local / FILES_JSON).read_bytes() == content:
            return None
        commit.remove_folder(local)
    try:
        hashes: Any = commit.parse_json(content.decode("utf-8", errors="replace"), Path(FILES_JSON))
    except ArtifactError as error:
        return str(error).partition("; ")[0]
    if not isinstance(hashes, dict) or not all(map(is_plain_name, hashes)):
        return f"{FILES_JSON} names no files of its own"
    mirror.reporter.note(f"fetching the checkpoint {mirror.objects.shown(folder)}")
    return mirror.fetch_folder(folder, {**hashes, FILES_JSON: None})


def remove_step(mirror: Mirror, folder: str, files: list[str]) -> None:
    """Removes a checkpoint from the URL; without its files.json, which goes first, it is none any more."""
    for name in sorted(files, key=lambda name: name != FILES_JSON):
        mirror.objects.remove(f"{folder}/{name}")
        mirror.known.pop(f"{folder}/{name}", None)
