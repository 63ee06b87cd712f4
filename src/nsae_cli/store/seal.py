"""The seal of an artifact's JSON: what it says can be told from what was written, by itself.

`checksum`, the last key, is the SHA-256 of everything else as canonical JSON: keys sorted, no spaces, UTF-8. So a file
that was reformatted keeps its seal and one with a changed value does not. `files` holds the SHA-256 of the artifact's
data files, which is how the seal covers those too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsae_cli import catalogue

CHECKSUM, FILES = "checksum", "files"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}")


def checksum_of(document: Mapping[str, Any]) -> str:
    """Hex SHA-256 over the canonical JSON of a document as it was parsed, without its `checksum`.

    Raises:
        ValueError: NaN or infinity in it.
    """
    content = {key: value for key, value in document.items() if key != CHECKSUM}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def seal(document: Mapping[str, Any], files: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A document as it is written: with `files` (if any are given) and, last, `checksum`.

    Values come back as a reader of the file will find them (tuples are lists), which is what the checksum is of.
    """
    content = {key: value for key, value in document.items() if key not in (CHECKSUM, FILES)}
    if files is not None:
        content[FILES] = dict(files)
    parsed: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return {**parsed, CHECKSUM: checksum_of(parsed)}


def is_sealed(document: Any) -> bool:
    """Whether a parsed document carries a seal; older ones, and those of other tools, have none."""
    return isinstance(document, dict) and CHECKSUM in document


def seal_fits(document: Any) -> bool:
    """Whether a document is what was written. One without a seal is, but `files` are never written without."""
    if not isinstance(document, dict):
        return True
    if CHECKSUM not in document:
        return FILES not in document
    try:
        return document[CHECKSUM] == checksum_of(document)
    except (ValueError, RecursionError):  # what cannot be written again was never written
        return False


def check_seal(document: Any, path: Path) -> None:
    """Refuses a document that is not what was written.

    Raises:
        ArtifactError: its checksum does not fit.
    """
    if not seal_fits(document):
        raise catalogue.CONTENT_CHANGED(
            f"{path}: the content is not what was written (its checksum differs); {repair(path)}"
        )


def is_plain_name(name: object) -> bool:
    """Whether a name that a file names stays in its folder: no separators, no "..", nothing hidden, no device."""
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def repair(path: Path) -> str:
    """What to do about a damaged file of an artifact's folder, for messages."""
    return f"run `nsae verify --repair {path.parent}`, which says how to make it again"
