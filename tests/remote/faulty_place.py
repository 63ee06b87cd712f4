"""A place for artifacts that fails where it is told to: fsspec's memory file system, under a protocol of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

URL = "faulty://bucket/ws"


class Faulty(MemoryFileSystem):
    """Counts what is done and does `fault` from operation `at` on, for `times` operations of the kind.

    Faults: ``error`` (nothing is done), ``after`` (it is done, but the answer is lost), ``truncate`` and ``flip`` (what
    is read is damaged), ``away`` (this and everything later fails).
    """

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    log: ClassVar[list[tuple[str, str]]] = []
    fault: ClassVar[str | None] = None
    at: ClassVar[int] = 0
    times: ClassVar[int] = 1
    count: ClassVar[int] = 0

    @classmethod
    def clear(cls) -> None:
        """As at the start: empty and without faults."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.heal()
        cls.log.clear()

    @classmethod
    def heal(cls) -> None:
        """Without faults from now on; what is there stays."""
        cls.fault, cls.at, cls.times, cls.count = None, 0, 1, 0

    @classmethod
    def arm(cls, fault: str, at: int, times: int = 1) -> None:
        """Fails at operation number `at`, counted from now and from 0."""
        cls.fault, cls.at, cls.times, cls.count = fault, at, times, 0

    @classmethod
    def objects(cls) -> dict[str, bytes]:
        """Everything that is there."""
        return {name.removeprefix("/bucket/ws/"): bytes(file.getbuffer()) for name, file in cls.store.items()}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def _due(self) -> str | None:
        """The fault of this operation, if it has one."""
        number = Faulty.count
        Faulty.count += 1
        if Faulty.fault is None or number < Faulty.at:
            return None
        return Faulty.fault if Faulty.fault == "away" or number < Faulty.at + Faulty.times else None

    def _write(self, what: str, path: str, write: Any) -> None:
        due = self._due()
        if due in ("error", "away"):
            raise OSError(f"{what}: the place does not answer: https://user:secret@host/x?X-Amz-Signature=abc")
        write()
        Faulty.log.append((what, self._strip_protocol(path).removeprefix("/bucket/ws/")))
        if due == "after":
            raise ConnectionResetError("connection reset by peer")

    def _read(self, content: bytes) -> bytes:
        due = self._due()
        if due in ("error", "away", "after"):
            raise OSError("the place does not answer")
        if due == "truncate":
            return content[: len(content) // 2]
        if due == "flip" and content:
            return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        return content

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._write("put", path, lambda: MemoryFileSystem.pipe_file(self, path, value, mode=mode))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        with open(lpath, "rb") as file:
            content = file.read()
        self._write("put", rpath, lambda: MemoryFileSystem.pipe_file(self, rpath, content))

    def rm_file(self, path: str) -> None:
        self._write("rm", path, lambda: MemoryFileSystem._rm(self, path))

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        content = bytes(self.store[self._found(path)].getbuffer())
        return self._read(content)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        content = self._read(bytes(self.store[self._found(rpath)].getbuffer()))
        with open(lpath, "wb") as file:
            file.write(content)

    def find(self, path: str, **kwargs: Any) -> Any:
        self._read(b"")
        return super().find(path, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        return super().info(path, **kwargs)

    def _found(self, path: str) -> str:
        name = self._strip_protocol(path)
        if name not in self.store:
            raise FileNotFoundError(path)
        return name


fsspec.register_implementation("faulty", Faulty, clobber=True)
