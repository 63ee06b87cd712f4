"""The Hugging Face hub and its local cache: what can be downloaded, what is there already."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsae_cli.doctor.check import Check, note, ok, reason
from nsae_cli.report.format import size_in_bytes

#: So long an answer of the hub is waited for, the name's look-up included.
_HUB_SECONDS = 2.5
#: So long the cache's files are counted.
_CACHE_SECONDS = 0.7
_ASKED = "/api/models/openai-community/gpt2"


class HubQuestion:
    """One request to the hub, in a thread of its own: looking up a name cannot be given a time limit.

    Args:
        endpoint: address of the hub.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._asked_at = time.monotonic()
        self._answer: str | None = None
        self._status: int | None = None
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    @classmethod
    def asked(cls) -> HubQuestion | None:
        """The question, on its way; None where the environment forbids it."""
        from huggingface_hub import constants

        return None if constants.HF_HUB_OFFLINE else cls(constants.ENDPOINT)

    def _ask(self) -> None:
        from huggingface_hub import get_session

        try:
            response = get_session().head(self.endpoint + _ASKED, timeout=_HUB_SECONDS)
            self._status = int(response.status_code)
        except Exception as error:  # whatever the client raises, there is no connection
            self._answer = reason(error)
        self._seconds = time.monotonic() - self._asked_at

    def check(self) -> Check:
        """What came of it, at the latest when the time is up."""
        self._thread.join(max(0.0, self._asked_at + _HUB_SECONDS - time.monotonic()))
        values: dict[str, Any] = {"endpoint": self.endpoint, "reachable": False, "seconds": None}
        remedy = "check network, proxy and HF_ENDPOINT; models in the cache, --model mini and folders work without it"
        if self._status is not None and self._status < 500:
            values |= {"reachable": True, "seconds": round(self._seconds, 2)}
            return ok("hub", f"{self.endpoint} answers", **values)
        if self._status is not None:
            return note("hub", f"{self.endpoint} answers with status {self._status}", remedy, **values)
        if self._answer is None:
            return note("hub", f"{self.endpoint}: no answer in {_HUB_SECONDS:g} s", remedy, **values)
        return note("hub", f"{self.endpoint} is not reachable ({self._answer})", remedy, **values)


def look_at_hugging_face(question: HubQuestion | None) -> Iterator[Check]:
    """The hub, the token, the cache.

    Args:
        question: asked before; None in offline mode.
    """
    from huggingface_hub import constants

    yield _token(constants.HF_TOKEN_PATH)
    yield _cache(Path(constants.HF_HUB_CACHE))
    if question is None:
        remedy = "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to download; the cache and --model mini work"
        yield note("hub", "not asked: offline mode is set in the environment", remedy, reachable=None)
    else:
        yield question.check()


def _token(path: str) -> Check:
    """Whether there is one; its value is never read."""
    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    if named:
        return ok("token", f"yes, in {named[0]}", present=True)
    present = Path(path).is_file()
    return ok("token", "yes, saved by hf auth login" if present else "none (gated models need one)", present=present)


def _cache(folder: Path) -> Check:
    if not folder.is_dir():
        return ok("cache", f"{folder}, not there yet", path=str(folder), exists=False, bytes=0)
    size, whole = _size(folder, time.monotonic() + _CACHE_SECONDS)
    repositories = sum(entry.name.startswith(("models--", "datasets--")) for entry in os.scandir(folder))
    values = {"path": str(folder), "exists": True, "bytes": size, "counted_whole": whole, "repositories": repositories}
    found = f"{folder}, {'' if whole else 'more than '}{size_in_bytes(size)} in {repositories} models and data sets"
    if not os.access(folder, os.W_OK | os.X_OK):
        return note("cache", f"{found}, cannot be written", "nothing new can be downloaded: set HF_HOME", **values)
    return ok("cache", found, **values)


def _size(folder: Path, deadline: float) -> tuple[int, bool]:
    """Bytes of all files below, links not counted; False where time was up before the end."""
    total, folders = 0, [str(folder)]
    while folders:
        if time.monotonic() > deadline:
            return total, False
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue  # another program is cleaning up, or no permission: the rest still counts
    return total, True
