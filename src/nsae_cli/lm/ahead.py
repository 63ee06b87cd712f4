"""Making items in a thread while those before them are used."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

_CHUNK = 32
_POLL_SECONDS = 0.2


def ahead(items: Iterable[T], most: int) -> Generator[T, None, None]:
    """The same items in the same order, made by a thread about `most` ahead of their use.

    What making an item raises is raised where the item would have come. Tokenizing releases Python's lock, so that it
    costs no time while a GPU computes.
    """
    ready: queue.Queue[list[T] | BaseException | None] = queue.Queue(maxsize=max(1, most // _CHUNK))
    stopped = threading.Event()

    def put(value: list[T] | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(value, timeout=_POLL_SECONDS)
                return

    def work() -> None:
        chunk: list[T] = []
        try:
            for item in items:
                chunk.append(item)
                if len(chunk) == _CHUNK:
                    put(chunk)
                    chunk = []
                if stopped.is_set():
                    return
            put(chunk)
            put(None)
        except BaseException as error:  # raised again by the one who reads
            put(chunk)
            put(error)

    thread = threading.Thread(target=work, name="nsae-ahead", daemon=True)
    thread.start()
    try:
        while (value := ready.get()) is not None:
            if isinstance(value, BaseException):
                raise value
            yield from value
    finally:
        stopped.set()
        thread.join(timeout=60)
