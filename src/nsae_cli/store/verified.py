"""Which tensors of a store were found intact, and finding that out ahead of a pass over the store."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from nsae_cli.store.commit import tensors_sha256

VERIFIED = "verified.jsonl"
#: Rows of a tensor that are hashed at a time, so that hashing ahead needs little memory.
_ROWS = 4096


class VerifiedTensors:
    """Remembers which tensors of which file version were found intact: one line each, in a file beside the manifest.

    Losing it, or a torn line, costs one more hash; a folder that cannot be written is therefore no error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: set[str] = set()
        with contextlib.suppress(OSError):
            self._known.update(path.read_text(encoding="utf-8", errors="replace").splitlines())

    @staticmethod
    def version(path: Path, tensor: str) -> str:
        """The line that stands for a tensor of the file as it is now."""
        status = path.stat()
        version = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
        return json.dumps({"file": path.name, "tensor": tensor, **version})

    def knows(self, path: Path, tensor: str) -> bool:
        """Whether the tensor of this version of the file was found intact."""
        with contextlib.suppress(OSError):
            return self.version(path, tensor) in self._known
        return False

    def remember(self, line: str) -> None:
        """From now on `knows` the tensor and the version of its file that the line stands for."""
        with contextlib.suppress(OSError), self._lock:
            self._known.add(line)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class HashAhead:
    """Hashes the tensors of one file in a thread, while the caller works on those of the file before.

    It only adds to what `VerifiedTensors` knows: a tensor that does not fit, or cannot be read, is left for its reader
    to find, and to say so.
    """

    def __init__(self, verified: VerifiedTensors) -> None:
        self._verified = verified
        self._path: Path | None = None
        self._thread: threading.Thread | None = None

    def begin(self, path: Path, expected: Mapping[str, str]) -> None:
        """Starts on a file, unless its tensors are known.

        Args:
            path: the shard.
            expected: SHA-256 of tensors in it, by name.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        unknown = {name: sha256 for name, sha256 in expected.items() if not self._verified.knows(path, name)}
        if unknown:
            self._path = path
            self._thread = threading.Thread(
                target=self._work, args=(path, unknown), name="nsae-hash-ahead", daemon=True
            )
            self._thread.start()

    def wait_for(self, path: Path) -> None:
        """Returns once nothing of the file is being hashed."""
        if self._thread is not None and self._path == path:
            self._thread.join()
            self._thread = None

    def _work(self, path: Path, expected: Mapping[str, str]) -> None:
        # Whatever is wrong with the file is met again, and told, by its reader.
        with contextlib.suppress(Exception), safe_open(path, framework="pt", backend="pread") as file:
            for name, sha256 in expected.items():
                version = self._verified.version(path, name)
                rows = file.get_slice(name)
                count = rows.get_shape()[0]
                parts = (rows[start : min(start + _ROWS, count)] for start in range(0, count, _ROWS))
                if tensors_sha256(parts) == sha256:
                    self._verified.remember(version)
