"""One small workspace for all tests of the command line: a store, its norms, two SAEs, what is measured of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import TRAIN, Outcome, nsae
from nsae_cli import interrupt


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    interrupt.clear()
    yield
    interrupt.clear()


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """A workspace and what each of the commands printed; each takes the newest result of the one before."""
    workspace = tmp_path_factory.mktemp("chain") / "runs"
    outcomes = {}
    for command in (
        ("collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu"),
        ("norms",),
        (*TRAIN, "--device", "cpu"),
        ("analyze-top-norms", "--top", "2%"),
        ("eval", "--device", "cpu"),
    ):
        outcomes[command[0]] = outcome = nsae("--workspace", workspace, *command)
        assert outcome.code == 0, outcome.err
    return workspace, outcomes


@pytest.fixture(scope="session")
def finished(chain: tuple[Path, dict[str, Outcome]]) -> Path:
    """The workspace after these commands. Tests only read it."""
    return chain[0]


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged or added to."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.fixture(scope="session")
def store(finished: Path) -> str:
    """The name of its activation store."""
    [folder] = (finished / "activations").iterdir()
    return folder.name
