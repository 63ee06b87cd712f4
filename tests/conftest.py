"""Shared by all tests: one finished workspace; also puts this folder on the import path, for `hand_store` and the like.

One thread: the products of the tests are small, and waiting at their barriers would take longer than computing them.
Set in the environment before torch is imported, so that commands started as processes have it too.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
# The Triton kernels of the sparse step run in Triton's interpreter, on the CPU. Read when triton is imported.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small workspace and what each of the commands printed; each takes the newest result of the one before."""
    from command import TRAIN, nsae

    workspace = tmp_path_factory.mktemp("chain") / "runs"
    outcomes = {}
    for command in (
        ("collect", "--model", "mini-sink", "--tokens", "20k", "--device", "cpu"),
        ("norms",),
        (*TRAIN, "--device", "cpu"),
        ("analyze-top-norms", "--top", "2%"),
        ("eval", "--device", "cpu"),
        ("audit", "--device", "cpu", "--tokens", "2560"),
    ):
        outcomes[command[0]] = outcome = nsae("--workspace", workspace, *command)
        assert outcome.code == 0, outcome.err
    return workspace, outcomes


@pytest.fixture(scope="session")
def finished(chain: tuple[Path, dict[str, Any]]) -> Path:
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
