"""An empty place, an empty cache and no waiting, for every test of places named by URLs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_place import Faulty

from nsae_cli import interrupt
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import commit, presence
from nsae_cli.store.remote import objects


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Faulty.clear()
    monkeypatch.setenv("NSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "WAITS", (0.0, 0.0))
    yield
    interrupt.clear()
    commit.observer = None
    presence.begin(SilentReporter())
    Faulty.clear()
