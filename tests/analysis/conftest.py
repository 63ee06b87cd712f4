"""Fixtures of the tests of `nsae_cli.analysis`."""

from __future__ import annotations

from pathlib import Path

import pytest
from known_store import KnownStore, write_known

from nsae_cli.store.workspace import Workspace


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is tested elsewhere (tests/report, tests/cli) and takes longer than all the rest."""
    for module in ("norms_artifact", "top_norms_artifact", "comparison_artifact"):
        monkeypatch.setattr(f"nsae_cli.analysis.{module}.save_png", lambda _, path: path.write_bytes(b"figure"))


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return write_known(tmp_path / "known")


@pytest.fixture
def foreign(tmp_path: Path) -> KnownStore:
    return write_known(tmp_path / "foreign", foreign=True)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "runs")
