"""One server of trials, and the stages that it has run undisturbed, for all tests of faults."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "lm"))

from forked import Server
from stages import Prepared, Stages


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Forks trials; see `fault_server`."""
    with Server(tmp_path_factory.mktemp("trials")) as server:
        yield server


@pytest.fixture(scope="session")
def stages(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """The commands that faults are tried on."""
    return Stages(server, tmp_path_factory.mktemp("stages"))


@pytest.fixture
def collect(stages: Stages) -> Prepared:
    """Collecting into nine shards."""
    return stages.get("collect")


@pytest.fixture
def trained(stages: Stages) -> Prepared:
    """Training one SAE: 20 steps, a checkpoint every 6."""
    return stages.get("train")


@pytest.fixture
def grid(stages: Stages) -> Prepared:
    """Training four SAEs side by side."""
    return stages.get("train grid")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the workspaces of trials go."""
    return tmp_path
