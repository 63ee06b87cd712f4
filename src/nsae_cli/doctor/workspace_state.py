"""The workspace: whether it can be written, how full its disk is, and what killed runs left in it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from nsae_cli.doctor.check import Check, note, ok, problem
from nsae_cli.errors import ResourceError
from nsae_cli.report.format import size_in_bytes
from nsae_cli.store import commit
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.store.writable import nearest_existing, require_writable

_LITTLE_SPACE = 2**30
_FEW_INODES = 1000
_CHOOSE = "choose another folder with --workspace or NSAE_WORKSPACE"
#: File systems on which locks and renames may not be what they are on a local disk.
_SHARED = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "beegfs", "fuse.glusterfs")


def look_at_workspace(workspace: Workspace) -> Iterator[Check]:
    """Folder, disk, artifacts, locks, leftovers, error log."""
    root = workspace.root.absolute()
    folder = _folder(root)
    yield folder
    if folder.fatal:
        return
    yield _disk(nearest_existing(root))
    if root.is_dir():
        yield _artifacts(workspace)
        yield from _locks(root)
        yield from _leftovers(root)
        yield from _error_log(root)


def _folder(root: Path) -> Check:
    existing = nearest_existing(root)
    values = {"path": str(root), "exists": root.is_dir(), "writable": False}
    if not existing.is_dir():
        return problem("folder", f"{root}: {existing} is a file, not a folder", _CHOOSE, fatal=True, **values)
    try:
        require_writable(root)
    except ResourceError as error:
        what, _, remedy = str(error).partition("; ")
        return problem("folder", f"{root}: {what}", remedy, fatal=True, **values)
    values["writable"] = True
    return ok("folder", f"{root}, {'writable' if root.is_dir() else 'not there yet, can be made'}", **values)


def _disk(folder: Path) -> Check:
    usage = shutil.disk_usage(folder)
    kind = _file_system(folder)
    status = os.statvfs(folder) if hasattr(os, "statvfs") else None
    inodes = status.f_favail if status is not None and status.f_files else None
    values = {"free": usage.free, "total": usage.total, "file_system": kind, "free_inodes": inodes}
    found = f"{size_in_bytes(usage.free)} of {size_in_bytes(usage.total)} free" + (f", {kind}" if kind else "")
    if usage.free < _LITTLE_SPACE:
        return note("disk", found, f"little is left: free space, or {_CHOOSE}", **values)
    if inodes is not None and inodes < _FEW_INODES:
        return note("disk", f"{found}, {inodes} more files possible", f"remove files, or {_CHOOSE}", **values)
    if kind in _SHARED:
        return note("disk", found, "a shared file system: run one command at a time in a folder", **values)
    return ok("disk", found, **values)


def _file_system(folder: Path) -> str | None:
    """The kind of file system that `folder` is on; None where it cannot be told."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    resolved = folder.resolve()
    best, kind = -1, None
    for line in lines:
        _, point, name, *_ = [*line.split(" "), "", "", ""]
        mounted = Path(point.replace("\\040", " "))
        if (resolved == mounted or mounted in resolved.parents) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), name
    return kind


def _artifacts(workspace: Workspace) -> Check:
    complete = {kind.folder: len(list(workspace.complete(kind))) for kind in Kind}
    unfinished = {kind.folder: len(list(workspace.unfinished(kind))) for kind in Kind}
    values = {"complete": complete, "unfinished": unfinished}
    found = f"{sum(complete.values())} complete"
    shown = ", ".join(f"{number} {kind}" for kind, number in complete.items() if number)
    if shown:
        found += f" ({shown})"
    if not any(unfinished.values()):
        return ok("artifacts", found, **values)
    shown = ", ".join(f"{number} {kind}" for kind, number in unfinished.items() if number)
    remedy = "the same command again finishes them; nsae list names them"
    return note("artifacts", f"{found}; unfinished: {shown}", remedy, **values)


def _locks(root: Path) -> Iterator[Check]:
    """Lock files, ``.NAME.lock`` beside artifacts' folders: held ones belong to a command that writes.

    Those of workers that share a store, ``.NAME.lock-1-of-3``, too.
    """
    files = [path for pattern in ("*/.*.lock", "*/.*.lock-*", "*/*/.*.lock") for path in root.glob(pattern)]
    if not files:
        return
    held = _held_inodes()
    writing = [path for path in files if held is not None and path.stat().st_ino in held]
    values = {"files": len(files), "held": None if held is None else len(writing)}
    if held is None:
        yield note("locks", f"{len(files)} lock files: commands that write, or killed ones", **values)
    elif stale := len(files) - len(writing):
        found = f"{stale} of {len(files)} not held by a process of this machine"
        remedy = "a killed command's is taken over by the next; one of another machine: nsae --break-lock COMMAND"
        yield note("locks", found, remedy, **values)
    else:
        yield ok("locks", f"{len(writing)} held: commands are writing", **values)


def _held_inodes() -> set[int] | None:
    """Inodes of all locked files of this machine; None where the system does not tell.

    Asked of the system and not by trying the lock, which another command might just be about to take.
    """
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
        return {int(word.rsplit(":", 1)[1]) for line in lines for word in line.split() if word.count(":") == 2}
    except (OSError, ValueError):
        return None


def _leftovers(root: Path) -> Iterator[Check]:
    """Temporary files and folders in artifacts, their cells and their checkpoints."""
    folders = [folder for depth in ("*/*/", "*/*/*/", "*/*/*/*/") for folder in root.glob(depth)]
    found = {path for folder in folders for path in commit.leftovers(folder)}
    if found:
        files = [file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        number = f"{len(found)} temporary file{'' if len(found) == 1 else 's'}"
        remedy = "where no command is running, the killed one left them; the same command again removes them"
        yield note("leftovers", f"{number}, {size_in_bytes(size)}", remedy, number=len(found), bytes=size)


def _error_log(root: Path) -> Iterator[Check]:
    log = root / "error.log"
    if log.is_file():
        days = max(0.0, time.time() - log.stat().st_mtime) / 86400
        found = f"the traceback of a bug, {days:.1f} days old"
        yield note("error.log", found, f"add it to the report: {log}", days=round(days, 2))
