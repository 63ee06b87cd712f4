"""A disk that is full, limited or broken (E1, E2, E5)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import checks
from forked import Ended, Server, fresh
from stages import Prepared
from tally import Tally

#: What the last line must say, by the system's number of the error.
_SAYS = {
    errno.ENOSPC: ("disk full", "no space left"),
    errno.EIO: ("nput/output error",),
    errno.EFBIG: ("file size limit",),
}


def fail_at_every_operation(
    server: Server,
    prepared: Prepared,
    folder: Path,
    code: int = errno.ENOSPC,
    kinds: list[str] | None = None,
    lasting: bool = True,
    points: Iterable[int] | None = None,
) -> Tally:
    """The system refuses the 1st, 2nd, … operation: the command says so and ends, and goes on once there is room.

    Args:
        code: the system's number of the error.
        kinds: only operations of these kinds count (``fsync``).
        lasting: all later operations fail too, as on a disk that stays full.
        points: only these operations.
    """
    name = errno.errorcode[code]
    tally = Tally(f"{name} at {'an operation' if kinds is None else ', '.join(kinds)}", prepared.stage.name)
    for k in itertools.count(1) if points is None else points:
        workspace = prepared.begin(folder)
        fault = {"at": k, "how": code, "kinds": kinds, "lasting": lasting}
        failed = server.run(prepared.trial(workspace, fault=fault))
        if not failed.faulted:
            shutil.rmtree(workspace)
            if points is None:
                break
            continue
        where = f"operation {k} {failed.of('fault')[0]}"
        if failed.code == 0:
            # What fails may be of no consequence (a note of how long it took): then nothing may be missing.
            tally.counts["done all the same"] += 1
            problems = []
        else:
            problems = checks.failed_in_one_line(failed, 4)
            if not any(words in failed.last_line for words in _SAYS[code]):
                problems.append(f"it does not say what is wrong: {failed.last_line}")
        problems += checks.half_files(prepared, workspace)
        if not lasting and failed.code:
            problems += [f"{path} is left over" for path in checks.leftovers(workspace)]
        problems += checks.run_again(server, prepared, workspace)[1]
        tally.add(where, problems)
        shutil.rmtree(workspace)
    return tally


@contextlib.contextmanager
def small_file_system(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes in memory, mounted for as long as it is used.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_small_file_systems(server: Server, prepared: Prepared, folder: Path, sizes: int) -> Tally:
    """The workspace on a file system of its own that becomes full, at `sizes` points of the command; then it grows.

    Half of the file systems are too small from the start; on the others somebody else takes the room, all but a few
    pages, at an operation of the command. Where mounting is not allowed, operations fail instead: counted as such.
    """
    tally = Tally("file system full", prepared.stage.name)
    operations = len(prepared.undisturbed.operations)
    before = sum(path.stat().st_size for path in prepared.start.rglob("*") if path.is_file())
    after = sum(len(content) for content in prepared.whole.values())
    for number in range(sizes):
        mount = fresh(folder)
        small, at = number % 2 == 0, 1 + operations * number // sizes
        room = before + 65536 + (after - before) * (number + 1) // (sizes + 1) if small else 2**26
        fault = {"at": at, "how": "fill", "filler": str(mount / "filler"), "leave": 4096 * (number % 7)}
        try:
            with small_file_system(mount, room) as mounted:
                workspace = mounted / "w"
                shutil.copytree(prepared.start, workspace)
                failed = server.run(prepared.trial(workspace, **({} if small else {"fault": fault})))
                tally.counts["on a mounted file system"] += 1
                problems = _says_that_it_is_full(failed, tally) + checks.half_files(prepared, workspace)
                (mounted / "filler").unlink(missing_ok=True)
                subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
                problems += checks.run_again(server, prepared, workspace)[1]
        except PermissionError:
            instead = fail_at_every_operation(server, prepared, folder, points=[at])
            tally.counts["mounting not allowed: operations failed instead"] += 1
            problems = instead.problems
        tally.add(f"{room} bytes" if small else f"full from operation {at} on", problems)
    return tally


def _says_that_it_is_full(failed: Ended, tally: Tally) -> list[str]:
    if failed.code == 0:
        tally.counts["fitted"] += 1
        return []
    problems = checks.failed_in_one_line(failed, 4)
    if "are free in" in failed.last_line:  # too small from the start: found out before anything is written
        tally.counts["refused before work"] += 1
    elif not any(words in failed.last_line for words in _SAYS[errno.ENOSPC]):
        problems.append(f"it does not say what is wrong: {failed.last_line}")
    return problems


def limit_file_size(server: Server, prepared: Prepared, folder: Path, sizes: Iterable[int]) -> Tally:
    """Files may not grow beyond a limit (ulimit -f)."""
    tally = Tally("file size limit", prepared.stage.name)
    for size in sizes:
        workspace = prepared.begin(folder)
        failed = server.run(prepared.trial(workspace, file_size=size))
        if failed.code == 0:
            tally.counts["fitted"] += 1
            problems = []
        else:
            problems = checks.failed_in_one_line(failed, 4)
            if "file size limit" not in failed.last_line:
                problems.append(f"it does not say what is wrong: {failed.last_line}")
        problems += checks.half_files(prepared, workspace) + checks.run_again(server, prepared, workspace)[1]
        tally.add(f"{size} bytes", problems)
        shutil.rmtree(workspace)
    return tally
