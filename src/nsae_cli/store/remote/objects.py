"""Files below a URL: read, written, listed and removed, again where that fails for a while.

Every failure comes out as one sentence with the URL and a remedy, whatever library stands behind the URL.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from nsae_cli import catalogue, interrupt
from nsae_cli.errors import NsaeError
from nsae_cli.store import commit
from nsae_cli.store.remote.places import normal, without_secrets

#: Seconds to wait before trying again; after the last, the command ends.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
#: What the package is called that opens a protocol, where fsspec itself does not.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "http": "aiohttp",
    "https": "aiohttp",
}
#: Where nothing can be written, or only with a commit for each file.
READ_ONLY = ("hf", "http", "https", "github", "zip", "tar", "data")
#: Real file systems: folders must be made, and a file under its name may be half-written.
_WITH_FOLDERS = ("file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs")
#: These do not pass by themselves.
_LASTING = (PermissionError, NotImplementedError, NotADirectoryError, IsADirectoryError)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Keys under which the libraries tell one version of a file from another, and when it was written.
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "md5", "content_md5", "blob_id", "oid", "crc32c", "mtime",
                 "LastModified", "last_modified", "updated", "modified", "created")  # fmt: skip
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file below a URL: its size in bytes, something that changes with its content, and when it was written."""

    size: int | None
    version: str
    written: float | None


class Objects:
    """The files below one URL, by their paths from it.

    Args:
        url: as given; may carry a login, which is never shown.

    Raises:
        UsageError: a protocol that nobody knows.
        ResourceError: the package for it is missing, or it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = normal(without_secrets(url))
        self.protocol = url.partition("://")[0].lower()
        self._fs, self._root = self._open(normal(url))

    @property
    def read_only(self) -> bool:
        """Whether nsae writes nothing there."""
        return self.protocol in READ_ONLY

    def shown(self, path: str) -> str:
        """The URL of a file, as it may be shown."""
        return f"{self.url}/{path}" if path else self.url

    def read(self, path: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: there is none.
            ResourceError: it could not be read.
        """
        return self._try("read", path, lambda: bytes(self._fs.cat_file(self._at(path))))

    def download(self, path: str, to: Path) -> None:
        """Copies a file to this disk.

        Raises:
            FileNotFoundError: there is none.
            ResourceError: it could not be read, or the disk is full.
        """
        self._try("read", path, lambda: self._fs.get_file(self._at(path), str(to)))

    def upload(self, source: Path, path: str) -> None:
        """Copies a file from this disk: one PUT, replacing what is there.

        Raises:
            ResourceError: it could not be written.
        """
        self._put(path, lambda target: self._fs.put_file(str(source), target))

    def write(self, path: str, content: bytes) -> None:
        """Writes a small file, replacing what is there.

        Raises:
            ResourceError: it could not be written.
        """
        self._put(path, lambda target: self._fs.pipe_file(target, content))

    def create(self, path: str, content: bytes) -> bool:
        """Writes a small file where none is; False where one is. As atomic as the place makes it.

        Raises:
            ResourceError: it could not be written.
        """

        def attempt() -> bool:
            self._make_parent(path)
            try:
                if self.protocol in ("file", "local"):
                    with self._fs.open(self._at(path), "xb") as file:
                        file.write(content)
                else:
                    self._fs.pipe_file(self._at(path), content, mode="create")
            except FileExistsError:
                # Ours, where the answer to an attempt before was lost on the way.
                return bytes(self._fs.cat_file(self._at(path))) == content
            except Exception:
                with contextlib.suppress(FileNotFoundError):  # some libraries have an error of their own for it
                    return bytes(self._fs.cat_file(self._at(path))) == content
                raise
            return True

        return self._try("write", path, attempt)

    def remove(self, path: str) -> None:
        """Removes a file; no error where it is gone already.

        Raises:
            ResourceError: it could not be removed.
        """

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))

        self._try("remove", path, attempt)

    def find(self, path: str) -> RemoteFile | None:
        """One file, or None where there is none.

        Raises:
            ResourceError: the place does not answer.
        """

        def attempt() -> RemoteFile | None:
            self._forget_listings()
            try:
                info = self._fs.info(self._at(path))
            except FileNotFoundError:
                return None
            return _described(info) if info.get("type") == "file" else None

        return self._try("look for", path, attempt)

    def files(self, path: str = "") -> dict[str, RemoteFile]:
        """All files below a path, by their paths from the URL; empty where there are none.

        Raises:
            ResourceError: the place does not answer.
        """
        at = self._at(path)

        def attempt() -> dict[str, RemoteFile]:
            self._forget_listings()
            try:
                found = self._fs.find(at, detail=True)
            except FileNotFoundError:
                return {}
            base = f"{self._root}/" if self._root else ""
            return {
                name.removeprefix(base): _described(info)
                for name, info in found.items()
                if name.startswith(base) and name != at
            }

        return self._try("list", path, attempt)

    # How

    def _at(self, path: str) -> str:
        return "/".join(part for part in (self._root, path) if part) if self._root != "/" else f"/{path}"

    def _forget_listings(self) -> None:
        """Libraries remember what a folder held; another machine may have written since."""
        self._fs.invalidate_cache()

    def _put(self, path: str, write: Callable[[str], Any]) -> None:
        def attempt() -> None:
            self._make_parent(path)
            target = self._at(path)
            if self.protocol not in _WITH_FOLDERS:
                write(target)
                return
            folder, _, name = target.rpartition("/")
            temporary = f"{folder}/.{name}.uploading.tmp"
            write(temporary)
            self._fs.mv(temporary, target)

        self._try("write", path, attempt)

    def _make_parent(self, path: str) -> None:
        # Not for object stores: there a missing bucket would be made.
        if self.protocol in _WITH_FOLDERS:
            self._fs.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)

    def _try(self, what: str, path: str, operation: Callable[[], T]) -> T:
        for wait in (*WAITS, None):
            try:
                return operation()
            except NsaeError:
                raise
            except FileNotFoundError as error:
                if what == "read":
                    raise
                raise self._failed(what, path, error) from error
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise commit.disk_error(error, Path(error.filename or path)) from error
                if wait is None or isinstance(error, _LASTING) or interrupt.stop_requested() is not None:
                    raise self._failed(what, path, error) from error
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _failed(self, what: str, path: str, error: Exception) -> NsaeError:
        return catalogue.REMOTE_FAILED(
            f"cannot {what} {self.shown(path)}: {reason_of(error)}; check the URL, your rights there and the network, "
            f"then run the same command again"
        )

    def _open(self, url: str) -> tuple[Any, str]:
        import fsspec

        shown = without_secrets(url)
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = PACKAGES.get(self.protocol, reason_of(error))
            raise catalogue.REMOTE_PACKAGE(
                f"{shown}: {self.protocol}:// needs a package that is not installed; pip install {package}"
            ) from error
        except ValueError as error:
            if "rotocol not known" in str(error):
                raise catalogue.URL_UNKNOWN(
                    f"{shown}: no package opens {self.protocol}://; use s3://, gs://, hf:// or another protocol of "
                    f"fsspec"
                ) from error
            raise catalogue.URL_UNKNOWN(
                f"{shown} is no URL of a folder ({reason_of(error)}); give one such as s3://bucket/folder"
            ) from error
        except Exception as error:
            raise catalogue.REMOTE_FAILED(
                f"cannot open {shown}: {reason_of(error)}; check the URL, your rights there and the network, then run "
                f"the same command again"
            ) from error
        return fs, root if root == "/" else root.rstrip("/")


def reason_of(error: Exception) -> str:
    """What an error of a library says, on one short line and without what may be a credential."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = (text.strip().splitlines() or [""])[0]
    return without_secrets(line)[:120] or type(error).__name__


def _described(info: dict[str, Any]) -> RemoteFile:
    size = info.get("size")
    facts = {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
    version = hashlib.sha256(json.dumps([size, facts], sort_keys=True).encode()).hexdigest()[:32]
    written = next((_seconds(info[key]) for key in _TIME_KEYS if info.get(key) is not None), None)
    return RemoteFile(None if size is None else int(size), version, written)


def _seconds(value: Any) -> float | None:
    """Seconds since the epoch of what libraries give as a time."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else None
