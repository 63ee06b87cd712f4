"""URLs of artifacts, what of them may be shown, and where their local copy lies."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from nsae_cli.store.commit import remove_folder
from nsae_cli.store.seal import is_plain_name

CACHE_VARIABLE, DEFAULT_CACHE = "NSAE_CACHE", "~/.cache/nsae"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(?<=\S)\?\S+")
_TOKEN = re.compile(r"\b(hf|sk|ghp|gho|glpat)[_-][A-Za-z0-9_\-]{8,}|\b(AKIA|ASIA)[A-Z0-9]{12,}|\bBearer \S+")


def is_url(reference: object) -> bool:
    """Whether something names a place by a URL, as s3://bucket/folder does."""
    return isinstance(reference, (str, Path)) and _URL.match(str(reference)) is not None


def without_secrets(text: str) -> str:
    """A text without logins, queries and tokens: they may carry credentials."""
    return _TOKEN.sub("…", _QUERY.sub("", _LOGIN.sub("", text)))


def normal(url: str) -> str:
    """A URL without a slash at its end."""
    return url.rstrip("/") if not url.endswith("://") else url


def cache_folder() -> Path:
    """Where local copies are kept: ``NSAE_CACHE``, else ``~/.cache/nsae``."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser().absolute()


def drop_copy(folder: Path) -> None:
    """Removes a folder of a local copy; one that is elsewhere is let alone."""
    if cache_folder() in folder.absolute().parents:
        remove_folder(folder)


def local_copy(url: str) -> Path:
    """The folder of a URL's copy: one for each, and called as the URL's last part is.

    The login is no part of it: another password does not make another place.
    """
    shown = without_secrets(normal(url))
    name = shown.rpartition("/")[2]
    return cache_folder() / hashlib.sha256(shown.encode()).hexdigest()[:12] / (name if is_plain_name(name) else "root")
