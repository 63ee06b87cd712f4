"""Changing an artifact's JSON as if it had been written so: sealed again where it was sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsae_cli.store.commit import file_sha256
from nsae_cli.store.seal import CHECKSUM, FILES, seal


def edit_json(path: Path, **changes: Any) -> None:
    """Replaces values; the seal fits afterwards, so that what is tried is what a reader makes of the values."""
    document = json.loads(path.read_text(encoding="utf-8"))
    sealed = CHECKSUM in document
    document |= changes
    path.write_text(json.dumps(seal(document, document.get(FILES)) if sealed else document), encoding="utf-8")


def seal_again(path: Path) -> None:
    """Seals the data files as they are now: as if they had been written so."""
    document = json.loads(path.read_text(encoding="utf-8"))
    edit_json(path, files={name: file_sha256(path.parent / name) for name in document[FILES]})
