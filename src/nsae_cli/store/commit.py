"""How nsae puts bytes on disk so that a crash never leaves a half-written file under a final name.

A file is written as ``.<name>.<uuid>.tmp`` in its own folder, flushed to the disk (fsync), renamed, and the folder is
flushed. Each artifact's JSON is written last by the same protocol: it is the artifact's completion mark.
Every durable operation passes through `_operation`, the one place where tests inject faults.

Figures are written by it too, so nothing here imports torch before tensors are written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from nsae_cli import catalogue
from nsae_cli.errors import ResourceError
from nsae_cli.store.seal import check_seal, seal

if TYPE_CHECKING:
    import torch

#: An artifact's JSON is far smaller; a file beyond is none, and is not read at all.
MAX_JSON_BYTES = 64 * 2**20

#: Called as ``fault_hook(operation, path)`` before every durable operation; tests set it to raise or to exit.
fault_hook: Callable[[str, Path], None] | None = None


def _operation(name: str, path: Path) -> None:
    if fault_hook is not None:
        fault_hook(name, path)


def _fsync_file(path: Path) -> None:
    _operation("fsync", path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    _operation("fsync-folder", folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's (and safetensors') complaints about a write into one sentence with a remedy.

    Raises:
        ResourceError: disk full, file size limit, no permission, vanished folder, input/output error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise disk_error(error, path) from error


def disk_error(error: Exception, path: Path) -> ResourceError:
    """What to raise for a write that failed."""
    text, code = str(error), _system_code(error)
    what = f"cannot write {path.name} in {path.parent}"
    if code in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
            return catalogue.DISK_FULL(
                f"disk full: {what} ({free / 2**20:,.0f} MiB free); free space and run the same command again"
            )
        return catalogue.DISK_FULL(f"disk full: {what}; free space and run the same command again")
    if code == errno.EFBIG:
        return catalogue.FILE_SIZE_LIMIT(
            f"file size limit reached: {what}; raise the limit (ulimit -f) and run the same command again"
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return catalogue.NO_PERMISSION(f"no permission: {what}; choose a writable folder with --workspace")
    if code in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return catalogue.FOLDER_MISSING(f"the folder is missing or not a folder: {what}; check --workspace")
    reason = text.splitlines()[0] if text else type(error).__name__
    return catalogue.WRITE_FAILED(f"{what}: {reason}; check the disk and run the same command again")


def _system_code(error: Exception) -> int | None:
    """The operating system's number of an error; safetensors has it as text only: ``… (os error 28)``."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


#: The system's reasons for not reading a file that is there. They say nothing about its content.
_UNREADABLE = (
    errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip


def refuse_unread(error: Exception, path: Path) -> None:
    """Tells a disk that does not answer from a file that is damaged: what cannot be read may be whole.

    Raises:
        ResourceError: the operating system could not read `path`; else the caller says what is wrong with its content.
    """
    code = _system_code(error)
    if code in _UNREADABLE:
        raise catalogue.READ_FAILED(
            f"cannot read {path}: {os.strerror(code)}; check the disk and the file's permissions"
        ) from error


def make_folder(folder: Path) -> None:
    """Creates `folder` and its parents; those that are new are durable afterwards.

    Raises:
        ResourceError: the folder cannot be created or written to.
    """
    with disk_errors(folder / "."):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(new):
            _operation("mkdir", path)
            path.mkdir(exist_ok=True)
            _fsync_folder(path.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Puts a file under its final name, whole or not at all.

    Args:
        path: the final name; its folder exists.
        write: writes the content to the temporary path that it is given.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with disk_errors(path):
            _operation("write", temporary)
            write(temporary)
            _fsync_file(temporary)
            _operation("rename", path)
            temporary.replace(path)
            _fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_file(path, write)


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """JSON text; NaN and Infinity are refused, since no artifact may hold them (undefined is null)."""
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all. For an artifact's own JSON this is the completion mark."""
    write_text(path, to_json(value) + "\n")


def write_document(path: Path, document: Mapping[str, Any], files: Iterable[str] | None = None) -> dict[str, Any]:
    """Writes an artifact's own JSON, sealed (see `seal`), whole or not at all: the completion mark.

    Args:
        path: the final name.
        document: without `files` and `checksum`.
        files: names of the artifact's data files, in the same folder and durable already (`write_file`, `sync`); None
            where the document has the hashes of its data files itself.

    Returns:
        The document as it was written.
    """
    hashes = None
    if files is not None:
        with disk_errors(path):
            hashes = {name: file_sha256(path.parent / name) for name in files}
    sealed = seal(document, hashes)
    write_json(path, sealed)
    return sealed


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_file(path, lambda temporary: save_file(contiguous, temporary))


def rename_folder(temporary: Path, final: Path) -> None:
    """Gives a folder whose files are durable its final name; replaces nothing."""
    with disk_errors(final):
        _fsync_folder(temporary)
        _operation("rename", final)
        os.rename(temporary, final)
        _fsync_folder(final.parent)


def set_aside(path: Path) -> Path:
    """Renames a file to a name that nobody reads and that `remove_leftovers` removes; returns where it is."""
    aside = path.parent / f".{path.name}.damaged.tmp"
    with disk_errors(path):
        _operation("rename", path)
        path.replace(aside)
        _fsync_folder(path.parent)
    return aside


def remove_file(path: Path) -> None:
    """Removes a file that is no longer needed; no error where it is gone already."""
    with disk_errors(path):
        _operation("unlink", path)
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that is no longer needed; no error where it is gone already.

    It loses its name at once: what is half removed never stands under it.
    """
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    with disk_errors(folder):
        _operation("rename", folder)
        try:
            folder.rename(temporary)
        except FileNotFoundError:
            return
        try:
            _operation("remove-tree", temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def append_log(path: Path, line: str) -> None:
    """Appends one line to a log that checkpoints hold a copy of; not flushed to the disk, see `sync`."""
    with disk_errors(path):
        _operation("log", path)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def append_line(path: Path, line: str) -> None:
    """Appends one line to a log of durable events and flushes it to the disk."""
    with disk_errors(path):
        _operation("append", path)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """Temporary files and folders in `folder`: half-written by a run that was killed, or by one that runs.

    Args:
        name: only those that would have become the file or folder of this name.
    """
    # safetensors writes under a name of its own, .tmp and six characters, before it gives a file the one asked for.
    own = folder.glob(".tmp??????") if name == "*" else ()
    return [*folder.glob(f".{name}.*.tmp"), *folder.glob(f"{name}.tmp-*"), *own]


def sync(path: Path) -> None:
    """Makes durable what was appended to a file without a flush to the disk."""
    with disk_errors(path):
        _fsync_file(path)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes temporary files and folders that a killed run left behind; `name` as in `leftovers`."""
    for leftover in leftovers(folder, name):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a CPU tensor's bytes in row-major order (what a safetensors file holds for it)."""
    return tensors_sha256([tensor])


def tensors_sha256(parts: Iterable[torch.Tensor]) -> str:
    """As `tensor_sha256`, of a tensor that is given as its runs of rows."""
    import torch

    digest = hashlib.sha256()
    for part in parts:
        if part.numel():
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Raises:
        ResourceError: the operating system cannot read it.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        refuse_unread(error, path)
        raise


def read_json(path: Path) -> Any:
    """Parses an artifact's JSON and checks its seal, if it has one.

    Raises:
        ArtifactError: no file of a plausible size, not valid JSON, duplicate keys, NaN or Infinity in it, or not what
            was written.
        ResourceError: it cannot be read.
    """
    document = parse_json(_read_text(path), path)
    check_seal(document, path)
    return document


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise catalogue.NOT_AN_ARTIFACT(f"{path} is not a file; make the artifact again")
        if status.st_size > MAX_JSON_BYTES:
            raise catalogue.JSON_DAMAGED(
                f"{path}: {status.st_size:,} bytes, an artifact's JSON has at most {MAX_JSON_BYTES:,}; the file is "
                f"damaged, make the artifact again"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise catalogue.READ_FAILED(f"cannot read {path}: {reason}; check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise catalogue.JSON_DAMAGED(
            f"{path} is not UTF-8 text; the file is damaged, make the artifact again"
        ) from error


def parse_json(text: str, path: Path) -> Any:
    """Parses JSON strictly; `path` is for messages.

    Raises:
        ArtifactError: not valid JSON, duplicate keys, or NaN or Infinity in it.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite_float
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise catalogue.JSON_DAMAGED(
            f"{path} is not valid JSON ({reason}); the file is damaged, make the artifact again"
        ) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"key {key!r} appears twice")
        seen[key] = value
    return seen


def _no_constants(text: str) -> None:
    raise ValueError(f"{text} is not allowed")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value
