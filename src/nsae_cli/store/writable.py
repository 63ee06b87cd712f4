"""Whether files can be made in a folder, asked before anything expensive is done."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from nsae_cli import catalogue

_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def require_writable(folder: Path) -> None:
    """Makes a nameless file in `folder`, or in the nearest folder above it that exists, and drops it again.

    Permission bits alone would not tell: the superuser passes them all, a read-only or virtual file system has its own.

    Raises:
        ResourceError: no file can be made there.
    """
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"nsae")
            file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise catalogue.DISK_FULL(
                f"disk full: cannot write in {existing}; free space, or choose --workspace"
            ) from error
        if error.errno == errno.EMFILE:
            raise catalogue.SYSTEM_ERROR(f"cannot write in {existing}: too many open files; raise ulimit -n") from error
        if error.errno in _NO_PERMISSION:
            raise catalogue.NO_PERMISSION(
                f"no permission to write in {existing}; choose a writable folder with --workspace"
            ) from error
        raise catalogue.WRITE_FAILED(
            f"cannot write in {existing} ({error.strerror or error}); choose a writable folder with --workspace"
        ) from error


def nearest_existing(path: Path) -> Path:
    """`path` itself or the nearest above it that exists; it may be a file."""
    absolute = path.absolute()
    # os.path: what may not be looked at does not exist, where pathlib raises an error.
    return next(candidate for candidate in (absolute, *absolute.parents) if os.path.exists(candidate))
